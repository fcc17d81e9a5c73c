"""Fixtures of the tests of the VAE that users hold."""

import pytest

from tests.oracle import FAMILIES, load, oracle_vae, random_latents


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def family_vae(family):
    return load(oracle_vae(family), chunk=2)


@pytest.fixture(scope="module")
def oracle():
    return oracle_vae("wan2.1")


@pytest.fixture
def vae(oracle):
    """A fresh one for each test, of the smaller family, for what does not depend on it."""
    return load(oracle, chunk=2)


@pytest.fixture
def latents():
    return random_latents("wan2.1", frames=6, rows=2, columns=3)
