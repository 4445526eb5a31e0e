# SPDX-License-Identifier: Apache-2.0
"""The gradient calibration layer: as a function, as a module, and put into models."""
