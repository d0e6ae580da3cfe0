"""A verdict for other people's tools: JUnit XML for a CI server, Markdown for a pull request."""

from xml.etree import ElementTree

from hirelc_deploy.budget import Check
from hirelc_deploy.verify import text
from hirelc_deploy.verify.judge import Verdict


def junit(verdict: Verdict, *, suite: str, unit: str = "%") -> str:
    """JUnit XML, one test case a check.  `suite` names the artifact, `unit` is that of the task's score.

    What cannot be verified is an error, and skipped where estimates are allowed: green or red as the exit status.
    """
    unknown = "skipped" if verdict.allow_estimates else "error"
    root = ElementTree.Element("testsuite", name=suite, tests=str(len(verdict.checks)))
    for kind, ok in (("failures", False), ("skipped" if verdict.allow_estimates else "errors", None)):
        root.set(kind, str(sum(check.ok is ok for check in verdict.checks)))
    for check in verdict.checks:
        case = ElementTree.SubElement(root, "testcase", classname=suite, name=check.name)
        if check.ok is not True:
            kind = "failure" if check.ok is False else unknown
            ElementTree.SubElement(case, kind, message=_printable(_sentence(check, unit)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode() + "\n"


def markdown(verdict: Verdict, *, title: str, unit: str = "%") -> str:
    """A heading with the verdict and a table of the checks.  `unit` is that of the task's score."""
    rows = [
        (check.name, text.limit(check, unit), text.measured(check, unit), text.outcome(check.ok))
        for check in verdict.checks
    ]
    lines = [f"### {title}: {verdict.word}", "", "| check | limit | measured | |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _sentence(check: Check, unit: str) -> str:
    return f"{text.measured(check, unit)} where {text.limit(check, unit)} is asked for: {text.outcome(check.ok)}"


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())


def _printable(value: str) -> str:
    """A runtime's own words may hold control characters, which XML has no way to write."""
    return "".join(c if c.isprintable() else " " for c in value)
