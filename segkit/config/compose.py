"""The configuration behind a verb that takes overrides, as ``train.py`` does."""

from __future__ import annotations

from collections.abc import Sequence

from segkit.config.schema import Config, config_dir, to_config


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
