"""fairseq-train with connections that start and end at the address HOST, as on another machine."""

import os
import sys

from fairseq_cli.train import cli_main
from torch.distributed import distributed_c10d as c10d


class Gloo(c10d.ProcessGroupGloo):
    def __init__(self, store, rank, size, timeout):
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=os.environ["HOST"])]
        options._timeout = timeout
        super().__init__(store, rank, size, options)


if __name__ == "__main__":
    c10d.ProcessGroupGloo = Gloo
    sys.argv[0] = "fairseq-train"
    cli_main()
