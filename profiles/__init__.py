"""Targets: one target, one TOML, named after it, and the tables that were measured on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from platformdirs import user_cache_path

from hirelc_deploy._outer import give_way
from hirelc_deploy.config import nearest, read_toml
from hirelc_deploy.errors import UserError
from hirelc_deploy.profiles._schema import Estimate, Target, parse_target
from hirelc_deploy.profiles._table import Row, read_table

__all__ = ["Estimate", "Row", "Tables", "Target", "load_target", "parse_target", "tables_of", "target_names"]

if __name__ != "hirelc_deploy.profiles":
    give_way(__name__)

FOLDER = Path(__file__).parent


def target_names() -> tuple[str, ...]:
    """The targets of this folder, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


@dataclass(frozen=True)
class Tables:
    """Where measured latencies of a target lie."""

    shipped: Path
    """Beside its TOML; there need not be one."""
    own: Path
    """What was measured here; of one kernel it wins."""

    def rows(self) -> list[Row]:
        """Of both tables.  Raises UserError for a broken line, by its number."""
        last = {row.key: row for path in (self.shipped, self.own) for row in read_table(path)}
        return list(last.values())


def tables_of(name_or_path: str, *, runtime: str, flags: Sequence[str]) -> Tables:
    """The tables of a target for a runtime (name and version) and the instruction sets of a CPU.

    What is measured for a target of this folder is kept in the user's cache, apart for each runtime and CPU; for a
    user's own target, beside its TOML.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path).expanduser().with_suffix(".csv")
        return Tables(path, path)
    kept_apart = sha256("+".join(flags).encode()).hexdigest()[:8]
    file = f"{name_or_path}-{runtime.replace(' ', '-')}-{kept_apart}.csv"
    return Tables(FOLDER / f"{name_or_path}.csv", user_cache_path("hirelc-deploy") / "tables" / file)


def load_target(name_or_path: str) -> Target:
    """A target of this folder by its name, or a user's own by FILE.toml.

    Raises UserError for a name that does not exist, with the nearest, and for a file that is no target, with the
    entry that is wrong.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path).expanduser()
        return parse_target(read_toml(path), str(path))
    if name_or_path not in target_names():
        raise UserError(
            f"there is no target {name_or_path!r}",
            fix=f"did you mean {nearest(name_or_path, target_names())}? `hirelc-deploy targets` lists them all, "
            "and FILE.toml names one of your own",
        )
    return parse_target(read_toml(FOLDER / f"{name_or_path}.toml"), f"profiles/{name_or_path}.toml")
