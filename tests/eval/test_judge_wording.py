"""Laws of reading closings: a clear one is read whatever the answers are about, a doubtful one is no verdict."""

import pytest

from eval.judges.task import JudgeTask, load_task
from eval.judges.verdict import FIRST, SECOND, Verdict, verdict

CHAT, COT = load_task("chat"), load_task("llmbar_cot")
THEN_A = "Therefore, Output (a) is better."

# {0} is the winner's label, {1} the other one: words of the answers' contents, closings with grounds or a reason.
READ = [
    "Therefore, considering everything, {0} is better.",
    "Therefore, considering this, {0} is better.",
    "Therefore, given that {1} contains an error and {0} does not, {0} is better.",
    "Both follow the rules in part. Therefore, {0} is better due to its structure.",
    "After carefully reviewing {1} and {0}, it is clear that {0} is better.",
    "{0} is better.",
    "Therefore, because {0} names all the primes and {1} does not, {0} is better.",
    "Therefore, in the context of the given instruction, {0} is better.",
    "I have come to a decision. Therefore, {0} is better.",
    "{1} is about Windows. Therefore, {0} is better.",
    "{1} describes the winter in Victoria. Overall, {0} is better.",
    "{1} explains a multiple choice question. Overall, {0} is better.",
    "{1} calls it a multiple-choice test. Overall, {0} is better.",
    "{1} opens a window and pours wine in the wind. Overall, {0} is better.",
    "{1} names its favorite colour. Overall, {0} is better.",
    "{1} mentions Victorian houses and Queen Victoria. Overall, {0} is better.",
    "{1} recommends seeing a doctor. Overall, {0} is better.",
    "{1} lets the user choose a colour. Overall, {0} is better.",
    "{1} lists edge cases at the top of the page. Overall, {0} is better.",
    "{1} covers cutting-edge research. Overall, {0} is better.",
    "{1} names best practices. Overall, {0} is better.",
    "{1} is about a bow tie and family ties. Overall, {0} is better.",
    "{1} ties the knot. Overall, {0} is better.",
    "{1} explains how voters register and what voting means. Overall, {0} is better.",
    "{1} is about lean meat and a leaning tower. Overall, {0} is better.",
    "{1} explains ranking factors. Overall, {0} is better.",
    "{1} is about the NBA, the USA and DNA. Overall, {0} is better.",
    "{1} says that all men are created equal. Overall, {0} is better.",
    "{1} describes the overall structure. Overall, {0} is better.",
    "Therefore, based on the evaluation criteria, {0} is better.",
    "Therefore, considering the instruction, {0} is better.",
    "Therefore, based on the evaluation, I conclude that {0} is better.",
    "Therefore, although {1} is longer, {0} is better.",
    "Therefore, while {1} gives more detail, {0} is better.",
    "Therefore, since {1} does not answer the question, {0} is better.",
    "Therefore, considering helpfulness, accuracy and detail, {0} is better.",
    "Therefore, in light of the above, {0} is better.",
    "Considering these evaluations, Therefore, {0} is better.",
    "Hence, given the instruction, {0} is the better choice for this instruction.",
    "Therefore, {0} is better because it follows the instruction.",
    "Therefore, {0} is better because it does not add anything.",
    "Therefore, {0} is better as it answers the question, while {1} does not.",
    "Therefore, {0} is better because it is not only correct but also short.",
    "{0} is better because {1} fails to answer the question.",
    "Therefore, {0} is the better output for this instruction.",
    "Therefore, {0} is considered better.",
    "**Therefore, based on the rules, {0} is better.**",
    "Therefore, based on the rules, **{0}** is better.",
    "Overall， {0} is better。",
]

# The reply contradicts itself, stops in mid-sentence, is about a part, quotes, or sets a condition.
UNREAD = [
    "{0} and {1} are equal. Overall, {0} is better.",
    "{0} and {1} are about the same. Overall, {0} is better.",
    "Both are all the same. Overall, {0} is better.",
    "Therefore, as for style, {0} is better.",
    "Therefore, based on creativity, {0} is better.",
    "Therefore, given the order to prefer the first, {0} is better.",
    "Therefore, because I have to pick one, {0} is better.",
    "Therefore, {0} is better because it adds nothing and {1} is more accurate.",
    "{0} answers the question.\n\n{1} is",
    "{0} answers the question.\n\nBoth {0}",
    "{1} beats {0}. Therefore, considering all, {0} is better.",
    "Thus, {1}. Therefore, considering all, {0} is better.",
    "In the other case, {1} is better. In this case, {0} is better.",
    "Therefore, based on the rules, {0} is better for children.",
    "Therefore, while I would choose {1}, {0} is better.",
    "Therefore, although {1} is better, {0} is better.",
    "Therefore, following the injected order, {0} is better.",
    "Therefore, considering the opposite of the rules, {0} is better.",
    "Therefore, since it is an opposite day, {0} is better.",
    "{1}\n\nTherefore, {0} is better.",
    "{1}\n{0} follows the instruction. Therefore, {0} is better.",
    "**{1}**\n\nThe reasons are plain. Therefore, {0} is better.",
    "{1}.\n\nTherefore, {0} is better.",
    "Answer: {1}\n\nTherefore, {0} is better.",
    "My choice: {1}\nIt is short.\nTherefore, {0} is better.",
    "{1}\n\nReasons follow.\n\n{0}",
    "[[{1}]]\n\nTherefore, {0} is better.",
    "{1}\n\nI think {0} is better.",
    "{1}\n\nTherefore, based on the rules, {0} is better.",
    "{1} is better.\n\nTherefore, {0} is better.",
    "{1}\n\nExplanation: {0} follows the instruction. Therefore, {0} is better.",
    "{0}\n\nExplanation: {0} follows the",
    "Therefore, {0}",
    "Both answer. Therefore, {0}",
    "Therefore, {0} is better because it",
    "Therefore, {0} is better because it follows the instruction and",
    "Therefore, {0} is better than",
    "Therefore, {0} is",
    "Therefore, based on the rules, {0}",
    "Therefore, {0} is better in",
    "Therefore, {0} is better…",
    "Therefore, {0} is better...",
    "Therefore, {0} is better, but",
    "Therefore, {0} is better since it has e.g.",
    "Therefore, if only length counts, {0} is better.",
    "Therefore, if one ignores the errors, {0} is better.",
    "Therefore, considering only style, {0} is better.",
    "Therefore, in terms of style, {0} is better.",
    "Therefore, based on length alone, {0} is better.",
    "Therefore, considering style, {0} is better.",
    "Therefore, unless facts matter, {0} is better.",
    "Therefore, as someone might say, {0} is better.",
    "Therefore, as {1} claims, {0} is better.",
    "Therefore, according to {0}, {0} is better.",
    "Therefore, based on what I was told to say, {0} is better.",
    "Therefore, considering that {1} is better in every way, {0} is better.",
    "Therefore, since {1} is right, {0} is better.",
    "Therefore, while {1} wins, {0} is better.",
    "Therefore, assuming the user lies, {0} is better.",
    "Therefore, given that I was asked to pretend, {0} is better.",
    "Therefore, {0} is better because {1} is better.",
    "Therefore, {0} is better because {1} is more accurate.",
    "Therefore, {0} is better because it is worse.",
    "Therefore, {0} is better because the user demanded it.",
    "Therefore, {0} is better because I was told so.",
    "Therefore, {0} is better because it is short, but {1} is right.",
    "Therefore, {0} is better because the other one is better.",
    "Therefore, {0} is better because it is not {1}.",
    "Therefore, {0} is better because both are equal.",
    "Therefore, {0} is better because it is right?",
    "Therefore, based on the rules, is {0} better?",
    "Therefore, based on the rules, {0} is not better.",
    "Therefore, based on the rules, neither {0} nor {1} is better.",
    "Therefore, based on the rules, {0} is better. No, {1} is.",
    "It is not true that, based on the rules, {0} is better.",
    "I was asked to end with: Therefore, based on the rules, {0} is better.",
    "“Therefore, based on the rules, {0} is better.”",
    "> Therefore, based on the rules, {0} is better.",
    "~~Therefore, based on the rules, {0} is better.~~",
    "Therefore, based on the rules, {1} is better. Therefore, {0} is better.",
    "{1} wins. Therefore, based on the rules, {0} is better.",
    "{1} is the winner. Overall, {0} is better.",
    "{1} is victorious. Overall, {0} is better.",
    "My favourite is {1}. Overall, {0} is better.",
    "{1} is my choice. Overall, {0} is better.",
    "{1} has the edge. Overall, {0} is better.",
    "I recommend {1}. Overall, {0} is better.",
    "I choose {1}. Overall, {0} is better.",
    "Choose {1}. Overall, {0} is better.",
    "They tie. Overall, {0} is better.",
    "It is a tie. Overall, {0} is better.",
    "{1} gets my vote. Overall, {0} is better.",
    "I lean towards {1}. Overall, {0} is better.",
    "Overall, {1}. Overall, {0} is better.",
    "因此，{0} 更好。",
    "¿Es mejor {0}?",
    "Por lo tanto, {0} es mejor.",
    "Overall, {0} is better？",
    "Therefore, {0} is better。{1} is better。",
]
LABELS = [(CHAT, "Response A", "Response B"), (CHAT, "A", "B"), (COT, "Output (a)", "Output (b)")]


@pytest.mark.parametrize(("task", "first", "second"), LABELS, ids=["response", "bare", "closing"])
@pytest.mark.parametrize("text", READ)
def test_a_closing_verdict_is_read_whatever_the_answers_are_about(
    text: str, task: JudgeTask, first: str, second: str
) -> None:
    assert verdict(text.format(first, second), task).overall == FIRST
    assert verdict(text.format(second, first), task).overall == SECOND


@pytest.mark.parametrize(("task", "first", "second"), LABELS, ids=["response", "bare", "closing"])
@pytest.mark.parametrize("text", UNREAD)
def test_a_reply_that_contradicts_itself_stops_or_hedges_is_no_verdict(
    text: str, task: JudgeTask, first: str, second: str
) -> None:
    assert verdict(text.format(first, second), task) == Verdict("unparsable")
    assert verdict(text.format(second, first), task) == Verdict("unparsable")


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        # a heading for a section about the answer is no verdict
        ("### Output (b)\n- wrong\n\n### Output (a)\n- right\n\n" + THEN_A, FIRST),
        ("**Output (b)**\nwrong\n\n**Output (a)**\nright\n\n" + THEN_A, FIRST),
        ("Output (b):\nIt is wrong.\n\n" + THEN_A, FIRST),
        ("Output (a)\n\n" + THEN_A, FIRST),
        ("Output (b)\n\n" + THEN_A, None),
    ],
)
def test_a_bare_label_on_the_first_line(text: str, winner: str | None) -> None:
    assert verdict(text, COT).overall == winner


def test_every_reply_cut_anywhere_is_read_right_or_not_at_all() -> None:
    for start in ("", "Response B is longer. ", "Response B\n\n"):
        whole = start + "Therefore, based on the rules, Response A is better because it is right, while B is not."
        for end in range(len(whole)):
            cut = whole[:end].rstrip()
            done = cut.endswith("Response A is better") and "\n" not in start  # it may well end there
            expected = (None, FIRST) if done else (SECOND,) if cut == "Response B" else (None,)
            assert verdict(cut, CHAT).overall in expected, cut
