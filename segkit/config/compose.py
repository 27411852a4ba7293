"""The configuration behind a verb that takes overrides, as ``train.py`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.config.schema import Config, targets
from segkit.config.targets import check_allowed
from segkit.errors import InputError


def compose(overrides: Sequence[str]) -> Config:
    """The configuration that ``python train.py OVERRIDES`` would run."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    ConfigStore.instance().store(name="schema", node=Config, provider="segkit")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return to_config(hydra_compose("train", overrides=list(overrides)))


def config_dir() -> Path:
    """The folder of the shipped YAML files: ``configs/`` of a checkout, or the copy inside an installed package."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise InputError(f"no configs folder with train.yaml lies beside {package}: install segkit again")


def to_config(node: Any) -> Config:
    """Turn the composed DictConfig ``node`` into a :class:`Config`; InputError for anything that is not allowed."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"the configuration is not valid: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    for name, target in targets(config):
        check_allowed(target, key=name)
    return config
