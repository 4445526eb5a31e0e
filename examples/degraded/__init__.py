# SPDX-License-Identifier: Apache-2.0
"""Classifies degraded images with a network that is told how degraded they are; docs/degraded.md has the results."""
