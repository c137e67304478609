"""What the token view says of each token: sampled by the policy, and looked at by the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from agentrl.algo.loss import LOSS_WEIGHTS
from agentrl.algo.staleness import AGES, MaxAge
from agentrl.store import Credit, StoreReader, StoreWriter
from agentrl.trajectory import Floats, Group, Member, Trajectory, rows_of
from agentrl.train.update import note_weights, train_rows
from agentrl.viewer.rows import arrays_of, view_of
