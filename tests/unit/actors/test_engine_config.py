import json
from pathlib import Path
from typing import Any

import pytest

from raymill.actors.engine_config import declared_config, engine_config
from raymill.runtime.errors import SpecError
from raymill.runtime.spec import Train


def net(inputs: int) -> None:
    raise NotImplementedError


def a_train(config: Any = None, **declared: Any) -> Train:
    return Train(model=net, config=config, **declared)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 1}}, "ZeRO stage 1.*set zero_optimization.stage to 0"),
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3"),
        ({"fp16": {"enabled": True}}, "use bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "use bf16"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"train_batch_size": 7}, "contradicts batch_rows=1024"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu"),
        ({"optimizer": {"type": "OneBitAdam"}}, "OneBitAdam"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.type"),
    ],
)
def test_what_a_gang_can_not_do_is_refused_with_the_reason(config: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        declared_config(a_train(config))


def test_the_global_batch_is_shared_by_however_many_ranks_there_are() -> None:
    train = a_train({"train_batch_size": 1000, "zero_optimization": {"stage": 0}}, batch_rows=1000)
    declared = declared_config(train)
    sizes = [engine_config(train, declared, ranks)["train_micro_batch_size_per_gpu"] for ranks in (1, 2, 3)]
    assert sizes == [1000, 500, 334]
    assert all("train_batch_size" not in engine_config(train, declared, ranks) for ranks in (1, 2))


def test_the_users_optimizer_keeps_its_settings_and_none_compiles_anything() -> None:
    train = a_train({"optimizer": {"type": "Adam", "params": {"lr": 0.5, "betas": [0.8, 0.9]}}}, learning_rate=0.1)
    made = engine_config(train, declared_config(train), 1)["optimizer"]
    assert made == {"type": "Adam", "params": {"lr": 0.5, "betas": [0.8, 0.9], "torch_adam": True}}
    plain = a_train(learning_rate=0.1)
    assert engine_config(plain, declared_config(plain), 1)["optimizer"]["params"]["lr"] == 0.1


def test_bf16_computes_in_bfloat16_and_keeps_whole_float32_state() -> None:
    train = a_train({"bf16": {"enabled": True}})
    config = engine_config(train, declared_config(train), 2)
    assert "bf16" not in config and config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def test_a_configuration_file_lies_beside_the_models_file_or_is_missed_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_clipping": 1.0}))
    assert declared_config(a_train(str(path))) == {"gradient_clipping": 1.0}
    with pytest.raises(SpecError, match=f"{Path(__file__).parent}/no.json can not be read"):
        declared_config(a_train("no.json"))
    path.write_text("[1")
    with pytest.raises(SpecError, match="is not JSON"):
        declared_config(a_train(str(path)))
    path.write_text("[1]")
    with pytest.raises(SpecError, match="no JSON object"):
        declared_config(a_train(str(path)))
