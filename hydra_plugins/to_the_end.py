"""Where Hydra looks for plugins: the sweeper of ``train.py -m``, see `training.sweep`.

The folder has no __init__.py because other packages install plugins into the same namespace.
"""

from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from training import sweep


class SweepToTheEnd(BasicSweeper):
    """Hydra's own sweeper, but that no job ends the sweep.

    Jobs that cannot be trained are named before the first one is, and a table says at the end what
    became of each.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """Train all combinations of ``arguments``; what the launcher returned for them.

        Raises:
            SystemExit: none of the jobs can be trained (code 2), some have no result (1), or a
                signal has ended the sweep.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (all_words,) = self.split_arguments(overrides, None)
        config, launch = self.config, self.launcher.launch
        jobs = sweep.plan(all_words, lambda words: loader.load_sweep_config(config, words))
        return sweep.run(
            jobs,
            config,
            launch,
            one_by_one=isinstance(self.launcher, BasicLauncher),
            at_once=self.max_batch_size,
        )


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="to_the_end",
    node=BasicSweeperConf(_target_=f"{__name__}.SweepToTheEnd"),
    provider="aaconv",
)
