# SPDX-License-Identifier: Apache-2.0
"""Trains networks with SGD, CSGD and the calibration layer on a grid of settings, and reports what came out."""
