"""`mmprune_train`, each process of which notes what loading takes: in the folder PEAK_MEMORY, the bytes by which its
resident memory rose, at most, from before the network is built until its weights are sharded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmprune_train.__main__ import main
from mmprune_train.training import network
from mmprune_train.training.module import MultimodalModule


def peak() -> int:
    """Of this process alone; `ru_maxrss` begins with that of the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    before: list[int] = []
    begin, configure = network.begin, MultimodalModule.configure_model

    def watched_begin(*args: Any, **kwargs: Any) -> Any:
        before.append(peak())
        return begin(*args, **kwargs)

    def watched_sharding(self: MultimodalModule) -> None:
        configure(self)
        note = Path(os.environ["PEAK_MEMORY"]) / f"rank-{self.global_rank}"
        note.write_text(str(peak() - before[0]))

    network.begin, MultimodalModule.configure_model = watched_begin, watched_sharding
    main()
