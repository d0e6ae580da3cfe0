"""The README's table of figures, from the result files: python benchmarks/figures.py --write

Without --write the table is printed.  `--record NAME=DIR` takes the manifest of an artifact folder as the result
file of that name first.  A test holds README and result files together.
"""

import argparse
import shutil
from pathlib import Path

from hirelc_deploy.verify.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"

ROWS = (
    ("digits (`demo`)", "export_demo.json", "`make demo`"),
    ("Fashion-MNIST `wide`", "export_wide.json", "`python benchmarks/fashion_mnist.py wide`"),
    ("Fashion-MNIST `small`", "export_small.json", "`python benchmarks/fashion_mnist.py small`"),
)
HEAD = (
    "| network | fp32 file | file | smaller | faster [95 %] | accuracy before, after "
    "| drop, points [95 %] | command |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def table() -> str:
    """The table and the machine it is from, in Markdown."""
    manifests = [Manifest.model_validate_json((RESULTS / file).read_text()) for _, file, _ in ROWS]
    rows = [_row(name, manifest, command) for (name, _, command), manifest in zip(ROWS, manifests, strict=True)]
    machines = {f"{m.environment.cpu} ({', '.join(m.environment.flags)})" for m in manifests}
    runtimes = {f"{m.runtime.name} {m.runtime.version}" for m in manifests}
    where = f"CPU: {'; '.join(sorted(machines))}. {'; '.join(sorted(runtimes))}, one thread, batch 1."
    return f"{HEAD}{''.join(rows)}\n{where}\n"


def _row(name: str, manifest: Manifest, command: str) -> str:
    before, after = manifest.baseline, manifest.measured
    assert after.drop_ci95 is not None
    assert after.speedup_ci95 is not None
    cells = (
        name,
        f"{before.size_bytes / 1000:.1f} KB",
        f"{after.size_bytes / 1000:.1f} KB",
        f"{after.compression:.1f} ×",
        f"{after.speedup:.1f} × [{after.speedup_ci95[0]:.1f}, {after.speedup_ci95[1]:.1f}]",
        f"{before.accuracy:.2f} %, {after.accuracy:.2f} %",
        f"{after.drop_points:.2f} [{after.drop_ci95[0]:.2f}, {after.drop_ci95[1]:.2f}]",
        command,
    )
    return f"| {' | '.join(cells)} |\n"


def with_table(readme: str) -> str:
    """The README with today's table between its marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{table()}{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--record", metavar="NAME=DIR", help="copy DIR/manifest.json to results/export_NAME.json")
    options = parser.parse_args()
    if options.record:
        name, _, folder = options.record.partition("=")
        shutil.copy(Path(folder) / "manifest.json", RESULTS / f"export_{name}.json")
    if options.write:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
