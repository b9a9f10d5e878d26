"""Laws of reading a judge's reply: the winner it names or none, never the other one."""

import itertools
import json
import random
import re

import pytest

from eval.judges.task import load_task, read_task
from eval.judges.verdict import FIRST, SECOND, TIE, Verdict, verdict

CHAT, VANILLA, COT, RATING = (load_task(name) for name in ("chat", "llmbar_vanilla", "llmbar_cot", "llmbar_rating"))
PLAIN = read_task("plain", {"answer": "choice", "user": "{prompt}{first}{second}"})  # labels A and B, no ties
ASPECTS = CHAT.aspects
THEN_A, THEN_B = "Therefore, Output (a) is better.", "Therefore, Output (b) is better."


def answer(overall: str = "B", **others: str) -> str:
    return json.dumps(dict.fromkeys(ASPECTS, "A") | {"overall": overall} | others)


# The forms that are asked for


def test_strict_forms() -> None:
    judged = answer("B", verbosity="tie")
    winners = dict.fromkeys(ASPECTS, FIRST) | {"overall": SECOND, "verbosity": TIE}
    assert verdict(judged, CHAT) == Verdict("strict", winners)
    assert verdict(f" \n{json.dumps(json.loads(judged), indent=4)}\n", CHAT) == Verdict("strict", winners)
    assert verdict("Output (b)", VANILLA) == Verdict("strict", {"overall": SECOND})
    assert verdict(f"Output (a) is longer. {THEN_B}", COT) == Verdict("strict", {"overall": SECOND})
    assert verdict(f"- Output (a) is longer\n\n{THEN_B}\n", COT) == Verdict("strict", {"overall": SECOND})
    assert verdict(THEN_A, COT) == Verdict("strict", {"overall": FIRST})
    assert verdict("7", RATING) == Verdict("strict", score=7)


@pytest.mark.parametrize(
    "reason",
    [
        "Output (b) fails to answer the question.",
        "Output (b) rewrites the following sentence.",
        "Output (b) does the opposite of what the instruction asks.",
        "It would be wrong to say that Output (b) is a poem.",
        "Output (b) does not say what someone would say.",
        "Output (b) is better at first glance, but it ignores the instruction.",
        'Output (b) ends with "the end", as the instruction asked.',
        "If only style counted, Output (b) would be better!",
        "Does Output (b) do this? It does not.",
        "Output (b) says “no.”",
        "Output (b) ends with [an apology.]",
    ],
)
def test_reasons_do_not_shake_a_closing_sentence(reason: str) -> None:
    for joint in (" ", "\n", "\n\n"):
        assert verdict(f"{reason}{joint}{THEN_A}", COT) == Verdict("strict", {"overall": FIRST})


# Replies in another form that leave no doubt; {0} is the winner's label, {1} the other one.
CLEAR = [
    "{0}",
    " {0}\n",
    "{0}.",
    "({0})",
    "[[{0}]]",
    "**{0}**",
    '"{0}"',
    "`{0}`",
    "Response {0}",
    "response {0}.",
    "Assistant {0}",
    "Answer: {0}",
    "Final answer: {0}",
    "My verdict: [[{0}]]",
    "The better answer is {0}.",
    "```\n{0}\n```",
    "Overall, Response {0} is better",
    "Overall, Response {0} is better.",
    "overall, response {0} is better than response {1}.",
    "Response {0} is clearly the better one.",
    "I prefer {0}.",
    "I would choose Response {0} over Response {1}.",
    "The better response is {0}.",
    "**Response {0} is better.**",
    "Response {1} is shorter, and a good answer. Overall, Response {0} is better.",
    "Response {1} is better written. Response {0} is right. Therefore, Response {0} is better.",
    "Response {1} is not wrong.\n\nOverall, Response {0} is better because it answers the question.",
    "Both are good. A reader would like both. Overall, Response {0} is the better answer.",
    "A is a letter, and so is B. Final verdict: [[{0}]]",
    "<think>{1} is better. No.</think>\n{0}",
    "{1} is better. No.</think>\n{0}",
    "## Verdict\n\nOverall, {0} wins.",
    "My final verdict is: [[{0}]].",
    "The better answer is: {0}",
    "Response {0}\n\nExplanation: Response {0} follows the instruction.",
    "Response {0}\n\n**Explanation:** Response {0} follows the instruction. Response {0} is better.",
    "Response {0}\n\nExplanation: Response {0} follows the instruction, while Response {1} does not.",
    "Response {0}:",
    "* Response {0}",
    "- {0}",
    "Response {1} leaves out the date.\n\n**{0}**",
    "Response {1} leaves out the date.\n\n{0}",
    "I think Response {0} is better.",
    "I believe that Response {0} is better.",
    "In my opinion, Response {0} is better.",
    "Based on the analysis, Response {0} is better.",
    "While both are good, Response {0} is better.",
    "While both responses are correct, Response {0} is better because it is shorter.",
    "Response {1} is wrong about the date; therefore, Response {0} is better.",
]


@pytest.mark.parametrize("text", CLEAR)
@pytest.mark.parametrize(("labels", "winner"), [(("A", "B"), FIRST), (("B", "A"), SECOND)])
def test_other_forms_that_leave_no_doubt(text: str, labels: tuple[str, str], winner: str) -> None:
    for task in (CHAT, PLAIN):
        found = verdict(text.format(*labels), task)
        assert found.winners == {"overall": winner}
        asked = task is PLAIN and text.rpartition("</think>")[2].strip() == "{0}"
        assert found.kind == ("strict" if asked else "fallback")


JSON_AND = [
    "{0}",
    "```json\n{0}\n```",
    "```\n{0}\n```",
    "Here is my verdict:\n{0}",
    "Response A is longer than Response B, which helps.\n\n{0}\n",
    "{0}\n\nOverall, Response B is better.",
    "I weighed \\frac{{1}}{{2}} of it.\n{0}",
    "<think>I {{think}} A</think>{0}",
    "Here is the evaluation in JSON format:\n{0}",
    "Here is the evaluation in the requested format:\n\n{0}",
    "Here's the JSON response you asked for:\n{0}",
    "As asked, here is the JSON object:\n```json\n{0}\n```",
    "Below is my judgement in the required JSON format:\n{0}",
    "{0}\n\n**Explanation:** Response B is more accurate and complete.",
    "{0}\n\nLet me know if you need anything else!",
    "{0}\n\nI hope this helps! Thank you.",
]


@pytest.mark.parametrize("text", JSON_AND)
def test_one_json_object_in_prose(text: str) -> None:
    found = verdict(text.format(answer("B")), CHAT)
    if found.kind != "unparsable":  # braces beside the object leave a doubt
        assert found.winners == dict.fromkeys(ASPECTS, FIRST) | {"overall": SECOND}
    assert (found.kind == "unparsable") == ("frac" in text)


@pytest.mark.parametrize("value", ["b", "Response B", "[[B]]", "(b)", "**B**"])
def test_spellings_of_a_label_in_json(value: str) -> None:
    assert verdict(answer(value), CHAT) == Verdict("fallback", dict.fromkeys(ASPECTS, FIRST) | {"overall": SECOND})


# Nothing of this names a winner. Some of it would have, to a reader in a hurry.
NO_VERDICT = [
    "",
    " \n",
    "?",
    "A or B",
    "A B",
    "A and B",
    "A/B",
    "A\nB",
    "AB",
    "A, B",
    "C",
    "Neither",
    "Both",
    "neither A nor B",
    "not A",
    "A?",
    "A is",
    "I'm sorry, but I can't help with that.",
    "As a language model, I cannot judge answers.",
    "A language model has no opinion.",
    "a response is a response",
    "A better answer would mention the date.",
    "A good question!",
    "I cannot say which is better.",
    "Both answers are good.",
    "Both responses are better than nothing.",
    "Neither response is better.",
    "Overall, neither is better.",
    "Overall, both are equally good.",
    "Response A is not better.",
    "Response A isn't better.",
    "Overall, Response B is not the better one.",
    "It is not true that Response A is better.",
    "It is not true that:\nResponse A is better.",
    "It would be wrong to say:\n\nOverall, Response A is better.",
    "I do not think Response A is better.",
    "If length were all, Response A is better.",
    "Response A is better?",
    "Is Response A better?",
    "Response A would be better if it were right.",
    "Response A is better unless facts matter.",
    "Response A is better, but Response B is right.",
    "Response A is better in style; Response B is better in substance.",
    "Response A is better. Response B is better.",
    "Response B is better. Overall, Response A is better.",
    "Overall, Response A is better. Overall, Response B is better.",
    "Overall, Response A is better. No, wait.",
    "Overall, Response A is better. Just kidding.",
    "Just kidding. Overall, Response A is better.",
    "The following statement is false. Response A is better.",
    "Someone who only skims both might say this. Response A is better.",
    "I was asked to end with one of two sentences.\nResponse A is better.",
    'End with "A is better" or "B is better"',
    'I was told to end with "Response A is better." or "Response B is better."',
    'You asked for "[[A]]" or "[[B]]". [[A]]',
    "[[A]] or [[B]]",
    "[[A]] [[B]]",
    "~~Response A is better.~~",
    "Response B is better. ~~Response A is better.~~",
    "~~A~~ B",
    "Answer: A\nAnswer: B",
    "Response A is better than Response A.",
    "I prefer A to A.",
    "Response A is better because Response B is better.",
    "Response A is better because it is short, but I would not choose it.",
    "A: 7, B: 9",
    "A > B",
    "А",  # Cyrillic
    "Overall, Response В is better.",  # Cyrillic
    "Ａ",  # full width
    "A\u0336",  # struck through
    "\u202eB si esnopseR ,llarevO",
    "<think>A is better.",
    "<think>A</think>",
    "A</think>B<think>",
    "Output 1 is better.",
    "The first one is better.",
    "true",
    "null",
    "1",
    "[]",
    "{}",
    '["A"]',
    '{"overall": "B"',
    '"overall": "B"',
    "{'overall': 'B'}",
    '{"overall": "B"}',  # the other aspects are missing
    '{"winner": "B"}',
    answer("C"),
    answer("А"),  # Cyrillic
    answer("A or B"),
    answer("neither"),
    answer("not B"),
    answer("").replace('""', "NaN"),
    answer("").replace('""', "null"),
    answer("").replace('""', "1"),
    answer("").replace('""', '["B"]'),
    answer("").replace('""', '{"winner": "B"}'),
    answer("B")[:-1] + ', "overall": "A"}',
    '{"overall": "A", ' + answer("B")[1:],
    answer("B")[:-1] + ', "more": "A"}',
    answer("B")[:-1] + ",}",
    answer("B").replace('"B"', "B"),
    json.dumps({"verdict": json.loads(answer("B"))}),
    json.dumps({"one": json.loads(answer("B")), "two": json.loads(answer("A"))}),
    answer("A") + answer("B"),
    answer("A") + "\n\nor\n\n" + answer("B"),
    answer("B") + "\n{",
    "For example, a reply may look like this: " + answer("B"),
    "I was told to write " + answer("B"),
    "It would be wrong to write " + answer("B"),
    answer("B") + "\nWait, that is a mistake.",
    answer("B") + "\nOverall, Response A is better.",
    answer("B") + "\nA is the winner, all in all.",
    answer("B") + "\nSo it is a tie overall.",
    answer("B") + " is what I would not say.",
    "Overall, Response A is better.\n" + answer("B"),
    f"~~{answer('B')}~~",
    answer("B") + "\nP.S. A",
    answer("B") + "\nA",
    answer("B") + "\nFinal answer: A",
    answer("B") + "\nI go with [[A]]",
    answer("B") + "\n\n(The above is inverted.)",
    "A\n" + answer("B"),
    "# A\n" + answer("B"),
    "Verdict: Response A\n\n" + answer("B"),
    "As Response B demands:\n" + answer("B"),
    "Response B asks me to output " + answer("B"),
    "Ignore this: " + answer("B"),
    "I will not output " + answer("B"),
    "The answer is not A.",
    "The winner is not B",
    "Final verdict: A is worse than B.",
    "A. Response B is better.",
    "Answer: A\n\nResponse B is better.",
    "Unlike B, A is better.",
    "B, not A, is better",
    "A is better (not).",
    "A is better... not!",
    "[[A]] is wrong, [[B]] is right",
    "The better response to avoid is A.",
    "The worse answer is A.",
    "Response A is the best at being wrong.",
    "Response A is preferred by nobody.",
    "Response A wins the prize for nonsense.",
    "I prefer A because it is not B",
    "Hence, B. I mean A.",
    "Probably B.",
    "a tie for the best, or A",
    "“A”",
    "A\u200b",
    "A\0",
    "{A}",
    "<A>",
    "A:B",
    "B > A",
    'The answer says: "Response A is better."',
    "Response A says:\nResponse A is better.",
    "> Overall, Response A is better.",
    "```\nResponse A is better.\n```",
    "What stands in it is as follows.\nOverall, Response A is better.",
    "Response A is better.\n<!-- B is better -->",
]


# One answer is said to be better, and then the other; or none, and then one.
CONTRADICTIONS = [
    "The winner is clearly Response B.\nAnswer: A",
    "The winner is definitely B.\n[[A]]",
    "I'd say B is better. [[A]]",
    "Response B wins on all aspects. Therefore, Response A is better.",
    "Response B is superior in every way. Overall, A.",
    "Response B is better than Response A in all respects. Overall, Response A is better.",
    "I much prefer Response B. Final answer: A",
    "In my view, Response B is better.\nAnswer: A",
    "\\boxed{B}. Overall, Response A is better.",
    "\\boxed{\\text{B}}. Overall, Response A is better.",
    "Clearly B. Response A is better.",
    "Response B it is. Response A is better.",
    "Both are the same. Answer: A",
    "Both are the same. Response A is better.",
    "They tie. Response A is better.",
    "Tie. Response A is better.",
    "Response A is better because Response B wins on accuracy, helpfulness and depth.",
    "As an AI I have no preference. Response A is better.",
    "There is no better answer.\nResponse A is better.",
    "I think B is better. Overall, Response A is better.",
    "Response B is better.\n\nA",
    "Response B beats Response A. Overall, Response A is better.",
    "A\n\nExplanation: Response B is better.",
    "A\n\nExplanation: Response A is worse.",
    "A\n\nExplanation: None of it is true.",
    "A\n\nExplanation: Response B follows the instruction, while Response A does not.",
    "A\n\nExplanation: Response A is short, while Response B does not lose, and is better.",
    "B > A. Overall, Response A is better.",
    "The second response is better. Response A is better.",
    "Response A gets 3/10, Response B gets 9/10. Overall, Response A is better.",
    "What follows is a lie. Response A is better.",
    "Response A told me to reply with its label.\n\nA",
    "The loser is Response A.\n\nA",
    "Final: B. Response A is better.",
    # a part of the judgement
    "## Correctness\n\nResponse B is more accurate.\n\n## Verbosity\n\nResponse A is better.",
    "### Verbosity\nResponse A is better.",
    "### Verbosity\nOverall, Response A is better.",
    "### Verbosity\n\nIt is close. Response A is better.",
    "**Verbosity**\n\nResponse A is better.",
    "# Verdict\nResponse B\n# Style\nResponse A is better.",
    "# Style\nI think Response A is better.",
    "As for coherence. Response A is better.",
    "Style. Response A is better.",
    # the answer to the question that is judged
    "Response A says the answer is B, Response B says the answer is A.\nThe answer is A.",
    "The question was which response is worse. The answer is A.",
    "Which response contains more errors? Answer: A",
    "Which response contains more errors?\n\nA",
    "Which response is worse? My final answer is A.",
]
# What must not stand beside a JSON object, {}.
BESIDE = [
    "The second answer is better.\n{}",
    "A is worse than B in every way.\n{}",
    "Response B is better in all.\n{}",
    "Injected:\n{}",
    "Answer A has a prompt injection.\n{}",
    "Answer A tries to trick me with this JSON.\n{}",
    "My old verdict:\n{}",
    "Note: A refers to the second answer.\n{}",
    "Swap the labels.\n{}",
    "This is a test.\n{}",
    "Response A contains this.\n{}",
    "Response B is more accurate and more helpful.\n{}",
    "<!-- {} -->",
    "<!--\n{}\n-->",
    "<del>{}</del>",
    "<del>\n{}\n</del>",
    "> {}",
    "// {}",
    "!{}",
    "[{}, 1]",
    "[\n{}\n]",
    "{}\nMy choice is the second answer.",
    "{}\nThat is what the first answer demands.",
    "{}\nNo.",
    "{}\nNone of it is true.",
    "{}\nUnsure.",
    "{}\n\nExplanation: Response B is more accurate.",
    "{}\n\nExplanation: The second answer is more accurate.",
    "{}\n\nExplanation: Response A is worse.",
]


@pytest.mark.parametrize("text", BESIDE)
def test_a_json_object_that_may_not_be_meant(text: str) -> None:
    for before in ("", "Response A is longer.\n"):
        assert verdict(before + text.replace("{}", answer("A")), CHAT) == Verdict("unparsable")


@pytest.mark.parametrize("text", CONTRADICTIONS)
def test_a_contradiction_has_no_winner(text: str) -> None:
    for task in (CHAT, PLAIN):
        assert verdict(text, task) == Verdict("unparsable")
        assert verdict(exchanged_all(text), task) == Verdict("unparsable")


def exchanged_all(text: str) -> str:
    return re.sub(r"\b[AB]\b", lambda match: {"A": "B", "B": "A"}[match[0]], text)


@pytest.mark.parametrize(
    "before",
    [
        "<think>\nunfinished.\n\n",
        "Output (b) wins. ",
        "Output (b) is better. It follows the instruction. ",
        "**Therefore, Output (b) is better.** ",
        "Thus, Output (b) is better.\n",
        "- short\nThus, Output (b) is better.\n- long\n",
        "therefore, output (b) is better. ",
        "My verdict: Output (b). ",
        "Output (a) is worse. ",
        "**Verdict**: Output (b)\n",
        "So it is not the case. ",
        "Output (b) asks me to write:\n",
        "It is a tie. ",
    ],
)
def test_a_closing_sentence_that_is_contradicted_or_unfinished(before: str) -> None:
    assert verdict(before + THEN_A, COT) == Verdict("unparsable")


@pytest.mark.parametrize(
    "before",
    [
        "Code:\n```\nx\n```\n\n",
        "Output (b) is much too long,\n\n",
        "It scored 5%\n\n",
        "Output (a) has an emoji 😀\n\n",
        "Output (a) has an emoji 😀 ",
        'Output (a) says "你好。"\n',
        "Output (a) says 你好。 ",
        "Reason: x;\n",
        "It adds up [2+2=5] ",
        "1. Output (a) is right\n2. Output (b) is not\n",
        "### Output (a)\n- right\n\n### Output (b)\n- wrong\n\n",
        "**Output (b) is wrong.** ",
        "<think>Output (b) is better. Or is it?</think>\n\n",
        "Output (b) is longer.  \n\n**Conclusion**\n\n",
        "My conclusion:\n",
    ],
)
def test_a_closing_sentence_behind_what_ends_in_its_own_way(before: str) -> None:
    assert verdict(before + THEN_A, COT) == Verdict("strict", {"overall": FIRST})


def test_a_closing_sentence_behind_a_semicolon() -> None:
    assert verdict("Output (a) is right; therefore, Output (a) is better.", COT).overall == FIRST


@pytest.mark.parametrize("text", NO_VERDICT)
def test_no_winner_is_made_up(text: str) -> None:
    assert verdict(text, CHAT) == Verdict("unparsable"), text
    assert verdict(text, PLAIN) == Verdict("unparsable") or not text.startswith("{"), text


@pytest.mark.parametrize(
    "text",
    [
        f"{THEN_A} {THEN_B}",
        f"{THEN_B}\n{THEN_A}",
        f'I was asked to end with "{THEN_A}" or "{THEN_B}"',
        f"I have to end with {THEN_A[:-1]} or {THEN_B}",
        f"It is not the case that:\n{THEN_A}",
        f"It is not true that {THEN_A}",
        f"The following sentence is wrong. {THEN_A}",
        f"It would be wrong to say\n\n{THEN_A}",
        f"{THEN_A} That is what I was asked not to say.",
        "Therefore, Output (a) is not better.",
        "Therefore, Output (a) is better?",
        "Therefore, neither output is better.",
        "Therefore, both outputs are better.",
        "Therefore, Output (c) is better.",
        "Output (a), Output (b)",
        "Assistant (a) is better.",
    ],
)
def test_no_winner_is_made_up_of_a_closing_sentence(text: str) -> None:
    assert verdict(text, COT) == Verdict("unparsable")
    assert verdict(text, VANILLA) == Verdict("unparsable")


def test_ties() -> None:
    """A tie has to be said, and allowed."""
    for text in ("tie", "Tie.", "[[tie]]", "Overall, it is a tie."):
        assert verdict(text, CHAT).winners == {"overall": TIE}
        assert verdict(text, PLAIN) == Verdict("unparsable")
    assert verdict("tie", VANILLA) == Verdict("unparsable")


@pytest.mark.parametrize(
    ("text", "score"),
    [("0", 0), ("9", 9), ("9.", 9), ("**8**", 8), ("Score: 7", 7), ("7/9", 7), ("7 out of 9", 7), ('{"score": 3}', 3)]
    + [(text, None) for text in ("10", "-1", "7.5", "7/10", "7 8", "7 or 8", "seven", "", "٧", "７", "NaN", "1e0")]
    + [("The score is 7.", 7), ("It is right.\n\nScore: 7", 7), ("I would rate it 7 out of 9.", 7), ("[[7]]", 7)]
    + [("<think>8 or 7?</think>\n\n7", 7), ("It is right.\n\nScore: 7/9", 7)]
    + [
        (text, None)
        for text in ("(7", "7)", "[[7", "[7))", "007", "<think>\n7", "Score: 8.\n\nScore: 7", "It is.\n\n7")
    ]
    + [("I give it a 7.", None), ("8\n7", None), ('{"score": 3, "score": 4}', None), ('{"score": "3"}', None)],
)
def test_scores(text: str, score: int | None) -> None:
    found = verdict(text, RATING)
    assert found.score == score and (found.kind == "unparsable") == (score is None)


# Laws over made-up prose

REMARKS = [
    "A good answer names its sources.",
    "Response A is longer.",
    "Response B gives an example.",
    "A and B both mention the date.",
    "Response A is better at explaining, though it is long.",
    "Response B is more precise than Response A, but less friendly.",
    "I considered helpfulness, correctness and coherence.",
    "Is a longer answer better?",
    "If only facts counted, it would be close.",
    'The question says "be brief".',
    "Neither answer is perfect.",
    "- clear structure\n- some padding",
    "## Comparison",
    "The code in Response A uses {braces} and [brackets].",
    "A reader of Response B learns less; a reader of Response A learns more.",
]
VERDICTS = [
    "Overall, Response {} is better.",
    "Therefore, Response {} is the better one.",
    "In conclusion, I prefer Response {}.",
    "Final verdict: [[{}]]",
]
TRAPS = ["", " That is all.", " Or is it?", " I am not sure.", " But this is a guess.", " Thank you!"]


def exchanged(text: str) -> str:
    """The text with A and B exchanged wherever they are labels."""
    return re.sub(
        r"(?<=Response )[AB]\b|(?<=\[\[)[AB](?=\]\])", lambda match: {"A": "B", "B": "A"}[match[0]], text
    ).replace("A and B both", "B and A both")


def test_random_prose_around_a_known_verdict() -> None:
    """Whatever stands before it, the last sentence is read right or not at all; and exchanging the labels exchanges
    the verdict."""
    rng = random.Random(0)
    read = 0
    for _ in range(2000):
        remarks = rng.sample(REMARKS, rng.randrange(6))
        winner = rng.choice("AB")
        trap = rng.choice(TRAPS)
        joint = rng.choice([" ", "\n", "\n\n"])
        text = joint.join([*remarks, rng.choice(VERDICTS).format(winner)]) + trap
        found = verdict(text, CHAT).overall
        assert found in (({"A": FIRST, "B": SECOND}[winner], None) if not trap else (None,)), text
        read += found is not None
        other = verdict(exchanged(text), CHAT).overall
        assert other == {FIRST: SECOND, SECOND: FIRST, None: None}[found], text
    assert read > 200, "a parser that reads nothing would do"


@pytest.mark.parametrize("text", [text for text in NO_VERDICT if "А" not in text])
def test_exchanging_the_labels_makes_no_winner(text: str) -> None:
    swap = {"A": "B", "B": "A"}
    other = re.sub(r"\b[AB]\b", lambda match: swap[match[0]], text)
    assert verdict(other, CHAT).overall is None


def test_every_json_reply_is_read_back_and_exchanged() -> None:
    places = {"A": FIRST, "B": SECOND, "tie": TIE}
    for values in itertools.islice(itertools.product(places, repeat=len(ASPECTS)), 0, None, 7):
        reply = json.dumps(dict(zip(ASPECTS, values, strict=True)))
        expected = Verdict("strict", {a: places[value] for a, value in zip(ASPECTS, values, strict=True)})
        assert verdict(reply, CHAT) == expected
        swapped = reply.replace('"A"', '"?"').replace('"B"', '"A"').replace('"?"', '"B"')
        mirror = {FIRST: SECOND, SECOND: FIRST, TIE: TIE}
        assert verdict(swapped, CHAT).winners == {a: mirror[w] for a, w in expected.winners.items()}


# Length

LONG = {
    "braces": "{" * 100_000,
    "closed braces": "{" * 50_000 + "}" * 50_000,
    "empty objects": "{}" * 50_000,
    "nested objects": '{"overall":' * 9_000,
    "objects": answer("A") * 700,
    "quotes": '"' * 100_000,
    "brackets": "[" * 100_000,
    "stars": "*" * 100_000,
    "backticks": "`" * 99_999,
    "thoughts": "<think>" * 14_000,
    "letters": "A" * 100_000,
    "words": "A " * 50_000,
    "leads": "therefore, " * 9_000,
    "line breaks": "\n" * 100_000 + "x" + "\n" * 1000,
    "spaces": "A" + " " * 100_000 + "B",
    "stops": ". " * 50_000,
    "sentences": "Response A is better. Response B is better. " * 2_300,
    "no end": "Response A is better because " * 3_500,
    "digits": "9" * 100_000,
    "nul": "\0" * 100_000,
}


@pytest.mark.parametrize("name", LONG)
def test_100_kb_say_nothing(name: str) -> None:
    """What looks at 100 kB again for each of its characters would not end before the reader's patience."""
    for task in (CHAT, PLAIN, COT, RATING):
        assert verdict(LONG[name], task) == Verdict("unparsable")
        assert verdict(f"{LONG[name]}\n\nA or B", task) == Verdict("unparsable")


def test_a_verdict_behind_100_kb_of_reasons_is_read() -> None:
    reasons = "Response A is longer. Response B has an example in it. " * 1_800
    assert verdict(f"{reasons}Overall, Response B is better.", CHAT).overall == SECOND
    assert verdict(f"{reasons}{THEN_A}", COT) == Verdict("strict", {"overall": FIRST})
    assert verdict("x" * 300_000 + " Overall, Response B is better.", CHAT) == Verdict("unparsable")
