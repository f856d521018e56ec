"""Own parameters and positions on several processes: those of one that has all samples."""

from pathlib import Path

import distributed_modules as scenarios
from distributed_processes import run
from torch.testing import assert_close


def test_several_processes_agree_with_one(tmp_path: Path) -> None:
    one = scenarios.trained(0, 1, "alone")
    for rank, found in enumerate(run(scenarios.both, 2, tmp_path)):
        for kind in ("copies", "sharded"):
            several = found[kind]
            close = {"rtol": 1e-9, "atol": 1e-12}
            assert_close(several["norms"], one["norms"][4 * rank : 4 * rank + 4], **close)
            assert_close(several["inner_products"], one["inner_products"], **close)
            assert_close(several["variance_trace"], one["variance_trace"], **close)
            assert_close(several["weights"], one["weights"], **close)
        alone, several = scenarios.folded(0, 1), found["folded"]
        assert_close(several["norms"], alone["norms"][4 * rank : 4 * rank + 4], **close)
        assert_close(several["weights"], alone["weights"], **close)
