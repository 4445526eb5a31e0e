# SPDX-License-Identifier: Apache-2.0
"""The optimizers, and their step as functions."""
