"""The table of methods: complete, without duplicates, and every function in it exists."""

import importlib

from upslope import methods

CONTROL = {"reinforce", "a2c", "a3c", "trpo", "acktr", "ppo", "group-ppo"}
CONTROL |= {"dqn", "sac", "soft-q", "ddpg", "td3", "es", "cem"}
LANGUAGE = {"sft", "reward-model", "lm-reinforce", "lm-ppo", "dpo", "grpo", "turn-ppo"}
PRESETS = {
    "ppo-penalty",
    "rloo",
    "gpg",
    "dr-grpo",
    "dapo",
    "gspo",
    "cispo",
    "vapo",
    "open-reasoner-zero",
    "reinforce++",
}


def test_every_algorithm_and_preset_has_its_row():
    names = [row.name for row in methods.METHODS]
    assert len(names) == len(set(names))
    assert set(names) == CONTROL | LANGUAGE | PRESETS
    for row in methods.METHODS:
        assert row.algo in CONTROL | LANGUAGE
        assert row.wing == ("control" if row.algo in CONTROL else "language")
        assert row.name == row.algo or row.name in PRESETS
        assert all(x != "" for x in row)


def test_functions_exist_and_names_are_unique():
    for table in (methods.PSIS, methods.SURROGATES):
        assert len({row.name for row in table}) == len(table)
        for row in table:
            module, name = row.function.rsplit(".", 1)
            assert callable(getattr(importlib.import_module(module), name))


def test_the_six_of_s4_table_2_2_are_there():
    wanted = ["total", "to-go", "to-go minus baseline", "Q", "advantage", "TD residual"]
    assert [row.name for row in methods.PSIS][:6] == wanted
    assert [row.source for row in methods.PSIS][:6] == [f"S4 table 2.2, {i}" for i in range(1, 7)]
