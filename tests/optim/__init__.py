# SPDX-License-Identifier: Apache-2.0
"""The optimizer: options, state, errors, its operator."""
