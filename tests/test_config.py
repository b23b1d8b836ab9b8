"""Configuration: typed, strict, and helpful when it refuses."""

import pytest

from twinrl.config import Config, load_config, make_config, save_config
from twinrl.core.errors import ConfigError


def test_the_shipped_configurations_load():
    config = load_config("configs/demo.yaml")
    assert config.name == "demo"


def test_what_is_saved_loads_back(tmp_path):
    config = make_config({"name": "x", "twins": {"envs": 7}, "real_rl": {"mix": {"real": 1.0}}})
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


def test_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("name: a\ntwins: {envs: 3}\n")
    config = load_config(
        tmp_path / "c.yaml", ["twins.envs=9", "sft.options={batch: 8}", "redis.url=null"]
    )
    assert (config.twins.envs, config.sft.options, config.redis.url) == (9, {"batch": 8}, None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"lerner": {}}, "did you mean 'learner'"),
        ({"learner": {"devise": "cpu"}}, "did you mean 'learner.device'"),
        ({"twins": {"zzz": 1}}, "known: actors, envs"),
        ({"task": {"chunk": 0}}, "task.chunk"),
        ({"twins": {"envs": "many"}}, "many"),
        ({"replay": {"flush": "sometimes"}}, "everysec"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_refusals_say_what_would_be_right(data, words):
    with pytest.raises(ConfigError, match=words):
        make_config(data)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("a: [", [], "YAML"),
        ("- 1\n", [], "section"),
        ("name: x", ["twins.envs"], "section.key=value"),
        ("name: x", ["name.y=1"], "value, not a section"),
    ],
)
def test_bad_files_and_overrides(tmp_path, text, overrides, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "c.yaml", overrides)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no configuration file nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_every_setting_is_described():
    def fields(model):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                yield from fields(inner)
            else:
                yield name, field.description

    assert [name for name, text in fields(Config) if not text] == []
