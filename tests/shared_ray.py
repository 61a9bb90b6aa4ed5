"""A Ray that the tests of a process share: it starts once, and its workers have imported what they need."""

import logging
import os
from unittest.mock import patch

import ray

from deltacache.pipeline.cluster.session import _loopback_only

SLOTS = 3
"""For decoders and encoders, as a command has on two cores."""
_ENCODER_BYTES = 3 << 30


class SharedRay:
    """Starts when a test needs it, and runs until the end or until a test wants to be without it."""

    def start(self) -> None:
        """Have it run; commands in this process use it and leave it running."""
        if ray.is_initialized():
            return
        # Without a token: whoever is started later, and has a Ray of its own, would find it in its environment.
        with patch.dict(os.environ, RAY_AUTH_MODE="disabled"), _loopback_only():
            ray.init(
                address="local",
                num_cpus=SLOTS,
                _memory=_ENCODER_BYTES,  # of one encoder, unless a command asks for more
                object_store_memory=200 << 20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )

    def stop(self) -> None:
        """For tests that start or join another."""
        ray.shutdown()
