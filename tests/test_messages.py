"""How many messages there are: a change that loses some by accident shows here, and states its new number."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "longspan"
#: texts that explain something to a user, such as "what was found: the rule. The remedy."
MESSAGES = 1124


def messages(tree):
    """The texts of a file that are sentences, f-strings as a whole; docstrings left out."""
    parts = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    documents = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
        and n.body
        and isinstance(n.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(v.value if isinstance(v, ast.Constant) else "0" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if id(node) not in parts | documents and len(text) >= 40 and text.rstrip().endswith((".", ".)", "?")):
            yield text


def test_no_message_is_lost():
    found = sum(len(list(messages(ast.parse(p.read_text())))) for p in SOURCE.rglob("*.py"))
    assert found >= MESSAGES, (
        f"{found} messages, {MESSAGES} before: which are gone? If on purpose, write the new number."
    )
