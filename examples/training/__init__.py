# SPDX-License-Identifier: Apache-2.0
"""Parts of ``examples/train.py``: data, model, training loop, checkpoints and reports."""
