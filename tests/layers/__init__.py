# SPDX-License-Identifier: Apache-2.0
"""The gradient calibration layer and its function."""
