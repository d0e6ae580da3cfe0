"""Targets: one target, one TOML, named after it, and the tables that were measured on it."""

from pathlib import Path

from hirelc_deploy._outer import give_way
from hirelc_deploy.config import nearest, read_toml
from hirelc_deploy.errors import UserError
from hirelc_deploy.profiles._schema import Target, parse_target

if __name__ != "hirelc_deploy.profiles":
    give_way(__name__)

FOLDER = Path(__file__).parent


def target_names() -> tuple[str, ...]:
    """The targets of this folder, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


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
