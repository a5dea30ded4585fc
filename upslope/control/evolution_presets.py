"""Settings of the evolution strategies and the cross-entropy method for known environments; all are ours."""

from upslope.control import environments, networks, optimizers
from upslope.control.cem import CEM
from upslope.control.es import ES

_LINEAR = networks.Config(hidden=())

ES_PRESETS: dict[str, ES] = {
    "CartPole-v1": ES(
        environment=environments.Config("CartPole-v1", 32),
        network=_LINEAR,
        optimizer=optimizers.Adam(learning_rate=0.1),
        total_steps=300_000,
        sigma=0.1,
    ),
}

CEM_PRESETS: dict[str, CEM] = {
    "CartPole-v1": CEM(environment=environments.Config("CartPole-v1", 32), network=_LINEAR, total_steps=250_000),
}


def es(environment_id: str) -> ES | None:
    """ES's settings for an environment, or None.

    >>> es("CartPole-v1").network.hidden
    ()
    """
    return ES_PRESETS.get(environment_id)


def cem(environment_id: str) -> CEM | None:
    """CEM's settings for an environment, or None.

    >>> cem("CartPole-v1").elite_fraction
    0.2
    """
    return CEM_PRESETS.get(environment_id)
