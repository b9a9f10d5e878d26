"""What several tests share: a tiny tokenizer, a tiny policy, a tiny reward model, prompts, a run's config, and a
server of chat completions."""

import os
from importlib.metadata import version

# Before jax starts: most of a test's time is compiling, so compile quickly rather than well. Fusion emitters double the
# time; the flag is jaxlib 0.10's, and a later jaxlib ends the process that is given it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # whatever else JAX finds, plan-check's compilers too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import contextlib
import gc
import gzip
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.checkpoint import Checkpoints
from models.config import REWARD_MODEL, Qwen3Config
from models.hf_weights import abstract_model, save_pretrained, split
from models.qwen3 import Backbone
from models.tokenizer import Tokenizer, train_bpe
from train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardSpec,
    ValidationConfig,
)

REVIEWS = Path(__file__).parent.parent / "data" / "reviews" / "sentiment_labelled_sentences.jsonl.gz"
VOCABULARY = 300  # 256 bytes, 2 special tokens, 42 merges


def pytest_configure(config: pytest.Config) -> None:
    """One compilation cache serves the session's workers and all programs that its tests start."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # a worker inherits it
        cache = tempfile.TemporaryDirectory(prefix="xla-")
        config.add_cleanup(cache.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def pytest_collection_finish() -> None:
    """What was imported and collected stays: collecting garbage need not go through it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def dies() -> Callable[[type[BaseException]], Any]:
    """`with dies(Killed):` expects that exception, as a kill: Orbax's threads, which end with a process, are waited for
    before anything else looks at the checkpoints."""

    @contextlib.contextmanager
    def dying(of: type[BaseException]) -> Iterator[None]:
        saving: list[Checkpoints] = []
        save = Checkpoints.save

        def noted(self: Checkpoints, *arguments: Any) -> None:
            saving.append(self)
            save(self, *arguments)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(of):
            patch.setattr(Checkpoints, "save", noted)
            yield
        for checkpoints in saving:
            checkpoints.wait()

    return dying


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Forty review sentences, of 4 words at least."""

    def texts() -> Iterator[str]:
        with gzip.open(REVIEWS, "rt", encoding="utf-8") as lines:
            for line in lines:
                if len((text := json.loads(line)["text"]).split()) >= 4:
                    yield text

    return [text for text, _ in zip(texts(), range(40), strict=False)]


@pytest.fixture(scope="session")
def tiny_config() -> Qwen3Config:
    """A policy whose random weights are large enough that its next-token distribution is far from uniform."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )


def random_model(config: Qwen3Config, seed: int = 0) -> Backbone:
    """A policy or reward model with random weights, norms included; made by numpy, which compiles nothing."""
    graphdef, shapes = split(abstract_model(config, remat="none"))
    rng = np.random.default_rng(seed)

    def values(path: Any, leaf: Any) -> jax.Array:
        middle, scale = (1.0, 0.1) if "norm" in jax.tree_util.keystr(path) else (0.0, config.initializer_range)
        return jnp.asarray(middle + scale * rng.normal(size=leaf.shape), jnp.float32)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(values, shapes))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Backbone]:
    """make_model(config, seed=0)."""
    return random_model


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(sentences, directory, VOCABULARY)
    return directory


@pytest.fixture
def chatty(tiny_tokenizer_dir: Path, tmp_path: Path) -> Tokenizer:
    """The tiny tokenizer with a chat template."""
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "chatty")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% if enable_thinking %}hm{% endif %}{% endif %}"
    (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
    return Tokenizer(tmp_path / "chatty")


@pytest.fixture(scope="session")
def tiny_policy_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Qwen3Config, tiny_tokenizer_dir: Path
) -> Path:
    """A Hugging Face directory: random weights and the tokenizer."""
    directory = tmp_path_factory.mktemp("policy")
    save_pretrained(random_model(tiny_config), directory)
    Tokenizer(tiny_tokenizer_dir).save(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_reward_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Qwen3Config, tiny_tokenizer_dir: Path
) -> Path:
    """A Hugging Face directory of a reward model, with the same tokenizer."""
    directory = tmp_path_factory.mktemp("reward")
    save_pretrained(random_model(replace(tiny_config, architecture=REWARD_MODEL), seed=1), directory)
    Tokenizer(tiny_tokenizer_dir).save(directory)
    return directory


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """JSONL: "prompt", the first 8 characters of a sentence (at most 8 tokens), and the column "wanted", the ninth."""
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": sentence[:8], "wanted": sentence[8]} for sentence in sentences[:24]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def policy_config(tiny_policy_dir: Path, tiny_reward_dir: Path, prompts_file: Path) -> Callable[..., PolicyConfig]:
    """policy_config(tmp_path, **overrides): a run of 3 steps in tmp_path / "run" that takes seconds."""

    def make(tmp_path: Path, **overrides: Any) -> PolicyConfig:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "model": ModelConfig(path=str(tiny_policy_dir), remat="none"),
            "data": DataConfig(train=str(prompts_file)),
            "rewards": [RewardSpec(model=str(tiny_reward_dir), name="tiny", max_length=64, batch_prompts=4)],
            "max_steps": 3,
            "prompts_per_step": 4,
            "num_generations": 4,
            "microbatch_prompts": 2,
            "max_prompt_length": 8,
            "max_completion_length": 8,
            "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
            "validation": ValidationConfig(every=2, prompts=4, num_generations=4, batch_prompts=4),
            "checkpoint": CheckpointConfig(every=1),
            "log": LogConfig(tensorboard=False, progress=False),
        }
        return PolicyConfig(**(settings | overrides))

    return make


class ChatServer(ThreadingHTTPServer):
    """A local server of OpenAI's chat completions. `answer(body)` gives a reply's text, or a dictionary with some of:
    text, finish_reason, status, headers, raw (bytes in place of JSON), cut (the connection, half-way through).

    `bodies`: what was asked; `answered`: for how many of them a whole reply was sent."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.answer, self.bodies, self.headers, self.answered = answer, [], [], 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error here."""


class ChatHandler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        said = self.server.answer(body)
        said = said if isinstance(said, dict) else {"text": said}
        whole = said.get("raw") or json.dumps(self.completion(body, said)).encode()
        self.send_response(said.get("status", 200))
        for name, value in {"Content-Type": "application/json", **said.get("headers", {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[: len(whole) // 2] if said.get("cut") else whole)
        if said.get("status", 200) == 200 and not said.get("cut"):
            with self.server.lock:
                self.server.answered += 1

    def completion(self, body: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
        if said.get("status", 200) != 200:
            return {"error": {"message": said.get("text", "no"), "type": "error", "code": said.get("code")}}
        message = {"role": "assistant", "content": said["text"], "refusal": said.get("refusal")}
        words = sum(len(m["content"].split()) for m in body["messages"])
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": said.get("finish_reason", "stop")}],
            "usage": {"prompt_tokens": words, "completion_tokens": 1, "total_tokens": words + 1},
        }

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silence."""


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[dict[str, Any]], Any]], ChatServer]]:
    """chat_server(answer) starts a server; the client's pauses are short, and no key is in the environment."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.setattr("train.rewards.chat_api.PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    started: list[ChatServer] = []

    def start(answer: Callable[[dict[str, Any]], Any]) -> ChatServer:
        started.append(ChatServer(answer))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
