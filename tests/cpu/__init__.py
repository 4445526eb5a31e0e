# SPDX-License-Identifier: Apache-2.0
"""The CPU loops as machine code."""
