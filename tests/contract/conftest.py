"""Shared by the contract tests."""

import pytest

pytest.register_assert_rewrite("forebay.testing.contract", "forebay.testing.client")
