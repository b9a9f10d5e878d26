"""IFEval: whether a completion follows instructions that a program can check, by lm-eval's own verifiers.

As a reward: `function: ifeval` (or train.rewards.ifeval.loose), for data with google/IFEval's columns
instruction_id_list and kwargs. Before the first completion NLTK's sentence splitter is downloaded if it is missing.
Sentences and words are split by the rules of the official labels, which newer versions of NLTK have changed.

The verifiers are the files of lm_eval/tasks/ifeval, loaded one by one under names of our own: importing them as
lm_eval.tasks.ifeval would run lm_eval/tasks/__init__.py first, which needs thirty packages (the verifiers need three).

References:
  Zhou et al., Instruction-Following Evaluation for Large Language Models, https://arxiv.org/abs/2311.07911.
"""

import ast
import functools
import logging
import random
import re
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

SPLITTER = "punkt_tab"
PACKAGE = "lm_eval.tasks.ifeval"
FILES = ("instructions_util", "instructions", "instructions_registry", "utils")  # each imports the one before it
INSTALL = "pip install langdetect immutabledict nltk && pip install --no-deps lm-eval"
WORD_LISTS = {"keywords", "forbidden_words"}  # of a text in place of a list, the letters would be the words
# What a verifier raises where it cannot use its arguments: they are its own business.
VERIFIER_ERRORS = (TypeError, ValueError, AttributeError, KeyError, re.error)

Arguments = Sequence[Mapping[str, Any] | None]


def strict(
    prompts: Sequence[Any],
    completions: Sequence[str],
    instruction_id_list: Sequence[Sequence[str] | None],
    kwargs: Sequence[Arguments | None],
    *,
    all_or_nothing: bool = False,
    **_: Any,
) -> list[float | None]:
    """Returns the share of its prompt's instructions that each completion follows; None without instructions.

    Args:
      instruction_id_list: of each completion's prompt, e.g. [["punctuation:no_comma"]].
      kwargs: the arguments of those instructions, one mapping each, or None; what is None in it is left out.
      all_or_nothing: 1 if all of them are followed, else 0 (IFEval's prompt level).
    """
    return _rewards("strict", all_or_nothing, prompts, completions, instruction_id_list, kwargs)


def loose(
    prompts: Sequence[Any],
    completions: Sequence[str],
    instruction_id_list: Sequence[Sequence[str] | None],
    kwargs: Sequence[Arguments | None],
    *,
    all_or_nothing: bool = False,
    **_: Any,
) -> list[float | None]:
    """As `strict`, but a completion may also follow without its "*", its first line or its last line."""
    return _rewards("loose", all_or_nothing, prompts, completions, instruction_id_list, kwargs)


def outcomes(
    prompt: Any, response: str, instruction_id_list: Sequence[str], kwargs: Arguments
) -> tuple[list[bool], list[bool]]:
    """Returns which instructions a response follows, strictly and loosely; deterministic.

    Args:
      prompt: text, or chat messages, whose last one is the request.

    Raises:
      ValueError: an instruction that IFEval does not have, or not one mapping of arguments for each.
    """
    given = (prompt, response, instruction_id_list, kwargs)
    return _followed("strict", *given), _followed("loose", *given)


def check_columns(instruction_id_list: Sequence[Any], kwargs: Sequence[Any], **_: Any) -> None:
    """Checks the instructions of all rows of the data; a row without instructions is left alone.

    Raises:
      ValueError: instructions that cannot be checked; the message names the row.
    """
    for number, (names, arguments) in enumerate(zip(instruction_id_list, kwargs, strict=True), 1):
        if names is not None and (isinstance(names, str) or len(names)):
            try:
                check_instructions(names, [] if arguments is None else arguments)
            except ValueError as error:
                raise ValueError(f"{error} (row {number} of the prompts)") from error


def check_instructions(names: Any, kwargs: Any) -> None:
    """Checks a list of instructions and their arguments.

    Raises:
      ValueError: not a list of IFEval's instructions; not one mapping of arguments, or None, for each; an argument that
        is missing or that a verifier cannot use, for it would draw one at random.
    """
    known = load_verifiers().instructions_registry.INSTRUCTION_DICT
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(
            f"ifeval: instruction_id_list: expected a list such as ['punctuation:no_comma'], got "
            f"{type(names).__name__} {str(names)[:80]!r}"
        )
    if unknown := [name for name in names if not isinstance(name, str) or name not in known]:
        raise ValueError(f"ifeval: there is no instruction {unknown[0]!r}; expected one of {', '.join(known)}")
    if isinstance(kwargs, str) or not isinstance(kwargs, Sequence) or len(kwargs) != len(names):
        count = len(kwargs) if isinstance(kwargs, list | tuple) else f"{type(kwargs).__name__} {str(kwargs)[:80]!r}"
        raise ValueError(f"ifeval: kwargs: expected one mapping for each of {list(names)}, got {count}")
    if wrong := [one for one in kwargs if not isinstance(one, Mapping | None)]:
        raise ValueError(f"ifeval: kwargs: expected a mapping or null for each of {list(names)}, got {wrong[0]!r}")
    for name, arguments in zip(names, kwargs, strict=True):
        _check_arguments(name, _given(arguments))


def _given(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments that are not None: in a table, a row has the columns of all instructions."""
    return {name: value for name, value in (arguments or {}).items() if value is not None}


def _check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Refuses arguments with which the verifier of an instruction would check something that nobody asked for."""
    instruction = load_verifiers().instructions_registry.INSTRUCTION_DICT[name](name)
    needed = instruction.get_instruction_args_keys()
    for argument in needed:
        value = arguments.get(argument)
        if not value or value != value:  # the verifiers leave out 0 and empty values too; NaN is a table's None
            raise ValueError(
                f"ifeval: {name} needs {argument!r}, got {value!r}; expected the arguments that google/IFEval gives it "
                f"({', '.join(needed)}), none of them null, empty or 0: its verifier would draw one at random"
            )
    for argument in WORD_LISTS & arguments.keys():
        if isinstance(arguments[argument], str):
            raise ValueError(f"ifeval: {name}: {argument}: expected a list of words, got {arguments[argument]!r}")
    # google/IFEval has letters such as "#", for which the official verifier draws another one: they stay
    tried = arguments | ({"letter": "a"} if "letter" in arguments else {})
    before = random.getstate()
    try:
        for keyword in _patterns(arguments):
            re.compile(keyword)
        instruction.build_description(**tried)
        has_drawn = random.getstate() != before
    except VERIFIER_ERRORS as error:
        raise _cannot_check(name, [arguments], error) from error
    finally:
        random.setstate(before)
    if has_drawn:
        raise ValueError(
            f"ifeval: {name} cannot use its kwargs {arguments}: its verifier would draw one at random; expected "
            f"numbers from 1, and an nth_paragraph up to num_paragraphs"
        )


def _patterns(arguments: Mapping[str, Any]) -> list[Any]:
    """The arguments that the verifiers take for regular expressions."""
    lists = [word for name in WORD_LISTS & arguments.keys() for word in arguments[name]]
    return lists + [arguments[name] for name in ("keyword", "section_spliter") if name in arguments]


def _cannot_check(names: str, arguments: Any, error: Exception) -> ValueError:
    return ValueError(
        f"ifeval: {names} cannot be checked with the kwargs {arguments} ({error}); expected the arguments that "
        f"google/IFEval gives these instructions"
    )


@functools.cache
def load_verifiers() -> Any:
    """Returns lm-eval's module utils, with the sentence splitter it needs; a repeated call gives the same module.

    Raises:
      ImportError, FileNotFoundError: a package or NLTK's sentence splitter is missing.
    """
    spec = find_spec("lm_eval")  # finds the package, does not import it
    if spec is None or spec.origin is None:
        raise ImportError(f"ifeval: needs the verifiers of lm-eval; {INSTALL}")
    require_splitter()
    try:
        import langdetect

        verifiers = import_files(Path(spec.origin).parent / "tasks" / "ifeval")
    except ImportError as error:
        raise ImportError(f"ifeval: {error}; {INSTALL}") from error
    use_official_splitter(verifiers.instructions_util)
    langdetect.DetectorFactory.seed = 0  # with it an answer depends on the text alone, and may be cached
    langdetect.detect = functools.lru_cache(maxsize=1 << 12)(langdetect.detect)  # a loose check asks up to 8 times
    # It reports each text whose language it cannot tell, such as "!!!", and counts it as followed.
    logging.getLogger(f"{__name__}.instructions").setLevel(logging.CRITICAL)
    return verifiers


def import_files(folder: Path) -> ModuleType:
    """Imports FILES from lm_eval/tasks/ifeval; returns the last one."""
    modules: dict[str, ModuleType] = {}
    for name in FILES:
        file, full_name = str(folder / f"{name}.py"), f"{__name__}.{name}"
        loader = _FileWithoutPackage(full_name, file)
        spec = spec_from_file_location(full_name, file, loader=loader)
        assert spec is not None
        modules[name] = module_from_spec(spec)
        vars(modules[name]).update(modules)  # in place of the imports that the loader leaves out
        loader.exec_module(modules[name])
    return modules[FILES[-1]]


class _FileWithoutPackage(SourceFileLoader):
    """Loads a file without its `from lm_eval.tasks.ifeval import ...`; whoever loads it provides these modules."""

    def get_code(self, fullname: str) -> CodeType:
        """Compiles the source anew: Python's cache of the file has the imports in it."""
        tree = ast.parse(self.get_data(self.path), self.path)
        tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == PACKAGE)]
        return compile(tree, self.path, "exec")


def require_splitter() -> None:
    """Finds NLTK's sentence splitter, or downloads it.

    Raises:
      FileNotFoundError: neither was possible.
    """
    import nltk

    try:
        nltk.data.find(f"tokenizers/{SPLITTER}/english/")
    except LookupError:
        print(f"ifeval: downloading NLTK's sentence splitter {SPLITTER}")
        if not nltk.download(SPLITTER, quiet=True):
            raise FileNotFoundError(
                f"ifeval: NLTK's sentence splitter {SPLITTER} is not there and could not be downloaded; where there is "
                f"a network: python -m nltk.downloader -d DIRECTORY {SPLITTER}; then set NLTK_DATA=DIRECTORY"
            ) from None


def use_official_splitter(util: Any) -> None:
    """Makes lm-eval's module instructions_util split texts as the official labels do, whatever NLTK is installed.

    NLTK 3.10.2 ends a sentence at a curly quote ('He said “No.” She left.' has two sentences then, officially one),
    3.10.1 splits off apostrophes, 3.9.3 dashes. The versions before have known security holes in their downloader.
    """
    import nltk
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktLanguageVars, PunktTokenizer

    class OfficialLanguageVars(PunktLanguageVars):
        re_boundary_realignment = re.compile(r"[\"')\]}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
        _re_non_word_chars = r"(?:[)\";}\]*:@'({\[?!])"

    class OfficialWordTokenizer(NLTKWordTokenizer):
        STARTING_QUOTES = (
            *NLTKWordTokenizer.STARTING_QUOTES[:-1],
            (re.compile(r"(?i)(')(?!re|ve|ll|m|t|s|d|n)(\w)\b"), r"\1 \2"),
        )
        PUNCTUATION = tuple(rule for rule in NLTKWordTokenizer.PUNCTUATION if not rule[0].fullmatch("–"))

    @functools.cache
    def sentence_tokenizer() -> Any:
        tokenizer = PunktTokenizer("english")
        tokenizer._lang_vars = OfficialLanguageVars()
        return tokenizer

    word_tokenizer = OfficialWordTokenizer()

    def word_tokenize(text: str) -> list[str]:
        return [word for part in sentence_tokenizer().tokenize(text) for word in word_tokenizer.tokenize(part)]

    util.count_sentences = lambda text: len(sentence_tokenizer().tokenize(text))
    util.nltk = SimpleNamespace(tokenize=nltk.tokenize, data=nltk.data, word_tokenize=word_tokenize)


def _rewards(
    kind: str,
    all_or_nothing: bool,
    prompts: Sequence[Any],
    completions: Sequence[str],
    instruction_id_list: Sequence[Sequence[str] | None],
    kwargs: Sequence[Arguments | None],
) -> list[float | None]:
    load_verifiers()  # now, even if there is nothing to score: the check of a run's set-up
    rewards: list[float | None] = []
    for prompt, text, names, arguments in zip(prompts, completions, instruction_id_list, kwargs, strict=True):
        if not names:
            rewards.append(None)
            continue
        followed = _followed(kind, prompt, text, names, arguments or [])
        rewards.append(float(all(followed)) if all_or_nothing else sum(followed) / len(followed))
    return rewards


def _followed(
    kind: str, prompt: Any, response: str, instruction_id_list: Sequence[str], kwargs: Arguments
) -> list[bool]:
    verifiers = load_verifiers()
    check_instructions(instruction_id_list, kwargs)
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    arguments = [_given(one) for one in kwargs]
    example = verifiers.InputExample(0, list(instruction_id_list), text, arguments)
    before = random.getstate()
    random.seed(0)  # for a letter such as "#" a verifier draws another one
    try:
        return getattr(verifiers, f"test_instruction_following_{kind}")(example, response).follow_instruction_list
    except VERIFIER_ERRORS as error:
        raise _cannot_check(", ".join(instruction_id_list), arguments, error) from error
    finally:
        random.setstate(before)
