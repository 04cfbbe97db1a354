from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_setup_cfg_lists_every_package_and_no_test():
    options = ConfigParser()
    options.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = options["options"]["packages"].split()
    found = [
        ".".join(folder.relative_to(ROOT).parts)
        for folder in (ROOT / "bnwatch", *(ROOT / "bnwatch").rglob("*"))
        if folder.is_dir() and any(folder.glob("*.py"))
    ]
    assert listed == sorted([*found, "bnwatch.examples"])


def test_the_version_is_said_once():
    import bnwatch

    options = ConfigParser()
    options.read(ROOT / "setup.cfg", encoding="utf-8")
    assert bnwatch.__version__ == options["metadata"]["version"]


def test_the_page_is_packaged_and_tensorboard_finds_the_plugin():
    options = ConfigParser()
    options.read(ROOT / "setup.cfg", encoding="utf-8")
    assert options["options.package_data"]["bnwatch.dashboard"].split() == ["static/*"]
    assert (ROOT / "bnwatch" / "dashboard" / "static" / "index.js").is_file()
    assert options["options.entry_points"]["tensorboard_plugins"].split("=", 1)[1].strip() == (
        "bnwatch.dashboard.loader:BNWatchLoader"
    )
