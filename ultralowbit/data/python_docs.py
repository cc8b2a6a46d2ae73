"""The demo model's text, read from the running Python: its documentation topics and its library's docstrings."""

import ast
import hashlib
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from textwrap import indent
from typing import Literal

SEPARATOR = "\n\n"  # between documents, as between paragraphs: no tokenizer treats it specially
HELDOUT_ONE_IN = 4  # topics, picked by a hash of the name: some 115 kB
QUOTE = 60  # characters from which a paragraph inside a held-out one, or around it, quotes it

# Tests, vendored packages, the topics themselves, and what some installs leave out.
SKIPPED = {
    *("site-packages", "dist-packages", "test", "tests", "lib2to3", "pydoc_data"),
    *("idlelib", "tkinter", "turtle.py", "turtledemo"),
}
# Written in C and safe to import; the library's .py files do not hold their docstrings.
C_MODULES = (
    *("_bisect", "_codecs", "_collections", "_csv", "_datetime", "_decimal", "_functools", "_heapq", "_io", "_json"),
    *("_operator", "_random", "_socket", "_sre", "_struct", "_thread", "_weakref", "array", "binascii", "builtins"),
    *("cmath", "errno", "gc", "itertools", "marshal", "math", "mmap", "nt", "posix", "select", "sys", "time"),
    *("unicodedata", "zlib"),
)

Entry = tuple[str, str]  # a signature, empty for running text, and what is said about it


def corpus(split: Literal["train", "heldout"]) -> str:
    """Return one split's documents as a single text, separated by blank lines."""
    return SEPARATOR.join(documents(split))


@lru_cache
def documents(split: Literal["train", "heldout"]) -> tuple[str, ...]:
    """Return one split's documents, a topic or a module each, without the paragraphs that an earlier one has."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    seen: set[str] = set()
    held = _distinct(_topics(heldout=True), seen)
    if split == "heldout":
        return held
    # Topics quote one another and docstrings quote them: a paragraph, not a topic, is what can leak.
    held_keys = [key for key in seen if len(key) >= QUOTE]
    held_text = _key(corpus("heldout"))
    texts = [*_topics(heldout=False), *_library(), *_c_modules()]
    for key in {_key(paragraph) for text in texts for _, doc in text for paragraph in _paragraphs(doc)}:
        if len(key) >= QUOTE and (key in held_text or any(held in key for held in held_keys)):
            seen.add(key)
    return _distinct(texts, seen)


def _topics(heldout: bool) -> Iterator[list[Entry]]:
    for name, text in sorted(topics.items()):
        digest = hashlib.sha256(name.encode()).digest()
        if (int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0) == heldout:
            yield [("", text)]


def _library() -> Iterator[list[Entry]]:
    """Yield the docstrings of every source file of the standard library, none of which is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue
            yield [("", ast.get_docstring(tree) or ""), *_definitions(tree)]


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.ClassDef):
            inner = f"{prefix}{child.name}."
            yield f"class {prefix}{child.name}", ast.get_docstring(child) or ""
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}({ast.unparse(child.args)})", ast.get_docstring(child) or ""
        yield from _definitions(child, inner)  # also into an if or a try


def _c_modules() -> Iterator[list[Entry]]:
    """Yield the docstrings of the modules written in C: their own, their functions', classes' and methods'."""
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # nt or posix, and what this build leaves out
            continue
        entries = [("", inspect.getdoc(module) or "")]
        for key, value in sorted(vars(module).items()):
            if inspect.isclass(value):
                entries.append((f"class {key}", _own_doc(value)))
                entries += [
                    (f"{key}.{member}{_signature(item)}", _own_doc(item))
                    for member, item in sorted(vars(value).items())
                    if callable(item)
                ]
            elif inspect.isbuiltin(value):
                entries.append((f"{key}{_signature(value)}", _own_doc(value)))
        yield entries


def _own_doc(item: object) -> str:
    doc = getattr(item, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _signature(item: object) -> str:
    text = getattr(item, "__text_signature__", None)  # inspect.signature would evaluate the defaults, and may raise
    return text.replace("$", "") if isinstance(text, str) else ""


def _paragraphs(text: str) -> list[str]:
    lines = "\n".join(line.rstrip() for line in text.expandtabs().splitlines())
    return [paragraph.strip("\n") for paragraph in re.split(r"\n{2,}", lines) if paragraph.strip()]


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())  # the same paragraph is indented and wrapped differently elsewhere


def _distinct(texts: Iterable[list[Entry]], seen: set[str]) -> tuple[str, ...]:
    """Lay each text out as the topics are, without paragraphs that seen has, and add the others' keys to it."""
    result = []
    for entries in texts:
        parts = []
        for signature, doc in entries:
            fresh = []
            for paragraph in _paragraphs(doc):
                key = _key(paragraph)
                if key not in seen:
                    seen.add(key)
                    fresh.append(indent(paragraph, "   ") if signature else paragraph)
            if fresh:  # no signature without its text
                parts += [signature, *fresh] if signature else fresh
        if parts:
            result.append(SEPARATOR.join(parts))
    return tuple(result)
