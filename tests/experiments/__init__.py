# SPDX-License-Identifier: Apache-2.0
"""The programs in benchmarks/ and examples/; not part of ``make test``."""
