"""A reward server: POST {prompts, completions, columns}, and it answers {rewards}. Run it, then train against it:

python examples/reward_server.py 8000
python -m train policy --config ... --rewards '[{function: remote, options: {url: "http://localhost:8000"}}]'
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def score(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float | None]:
    """Put your model here. One number, or None, for each completion."""
    return [-abs(len(text.split()) - 20) / 20 for text in completions]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"rewards": score(**asked)}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
