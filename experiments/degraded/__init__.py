# SPDX-License-Identifier: Apache-2.0
"""Classifies degraded images with a network that gets their level as an input; docs/degraded.md has the results."""
