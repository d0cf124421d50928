"""A misspelt name costs one line and names the right one, on the command line and in YAML."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_sgd.cli.messages import one_line
from lightning_sgd.cli.settings import Setting, read_settings

MODEL = ("--model", "Descent", "--data", "Numbers")

ON_THE_COMMAND_LINE = {
    # classes of every kind, in bare and in dotted spelling
    "--optimizer Mass": "unknown optimizer 'Mass': did you mean 'MaSS'?",
    "--optimizer mass": "unknown optimizer 'mass': did you mean 'MaSS'?",
    "--optimizer adamw": "unknown optimizer 'adamw': did you mean 'AdamW'?",
    "--optimizer=Mass": "unknown optimizer 'Mass': did you mean 'MaSS'?",
    "--optimizer.class_path Mass": "unknown optimizer 'Mass': did you mean 'MaSS'?",
    "--optimizer.help Mass": "unknown optimizer 'Mass': did you mean 'MaSS'?",
    "--optimizer lightning_sgd.Mass": (
        "unknown optimizer 'lightning_sgd.Mass': did you mean 'lightning_sgd.MaSS'?"
    ),
    "--optimizer lightningsgd.MaSS": (
        "unknown optimizer 'lightningsgd.MaSS': did you mean 'lightning_sgd.MaSS'?"
    ),
    "--optimizer torch.optm.SGD": (
        "unknown optimizer 'torch.optm.SGD': did you mean 'torch.optim.SGD'?"
    ),
    "--lr_scheduler PerStepLr": (
        "unknown learning-rate scheduler 'PerStepLr': did you mean 'PerStepLR'?"
    ),
    "--trainer.callbacks+=ModelCheckpont": (
        "unknown callback 'ModelCheckpont': did you mean 'ModelCheckpoint'?"
    ),
    "--trainer.callbacks=ModelCheckpont": (
        "unknown callback 'ModelCheckpont': did you mean 'ModelCheckpoint'?"
    ),
    "--trainer.logger CSVLoger": "unknown logger 'CSVLoger': did you mean 'CSVLogger'?",
    "--trainer.strategy.class_path DDPStrateg": (
        "unknown strategy 'DDPStrateg': did you mean 'DDPStrategy'?"
    ),
    "--trainer.strategy DDPStrateg --trainer.strategy.start_method fork": (
        "unknown strategy 'DDPStrateg': did you mean 'DDPStrategy'?"
    ),
    "--model.backbone DeepBackbon": (
        "unknown class 'DeepBackbon' for '--model.backbone': did you mean 'DeepBackbone'?"
    ),
    # keys, at every depth
    "--trainer.max_epoch 3": (
        "unknown option '--trainer.max_epoch': did you mean '--trainer.max_epochs'?"
    ),
    "--trainr.max_epochs 3": (
        "unknown option '--trainr.max_epochs': did you mean '--trainer.max_epochs'?"
    ),
    "--max_epochs 3": "unknown option '--max_epochs': did you mean '--trainer.max_epochs'?",
    "--seed_everythin 3": "unknown option '--seed_everythin': did you mean '--seed_everything'?",
    "--test_after_fitt true": (
        "unknown option '--test_after_fitt': did you mean '--test_after_fit'?"
    ),
    "--optimizer MaSS --optimizer.alhpa 0.1": (
        "unknown option '--optimizer.alhpa': did you mean '--optimizer.alpha'?"
    ),
    "--optimizer MaSS --optimizer.init_args.alhpa 0.1": (
        "unknown option '--optimizer.init_args.alhpa': did you mean '--optimizer.init_args.alpha'?"
    ),
    "--lr_scheduler StepLR --lr_scheduler.step_siz 1": (
        "unknown option '--lr_scheduler.step_siz': did you mean '--lr_scheduler.step_size'?"
    ),
    "--trainer.callbacks+=Timer --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitr=x": (
        "unknown option '--trainer.callbacks.monitr': did you mean '--trainer.callbacks.monitor'?"
    ),
    "--model.backbone DeepBackbone --model.backbone.dept 2": (
        "unknown option '--model.backbone.dept': did you mean '--model.backbone.depth'?"
    ),
    # strategies by name
    "--trainer.strategy dpp": "unknown strategy 'dpp': did you mean 'ddp'?",
    "--trainer.strategy mixing_in_test": (
        "unknown strategy 'mixing_in_test': did you mean 'mixing_in_tests'?"
    ),
    "--trainer.strategy DDPStrategy": (
        "strategy 'DDPStrategy' is a class: give it as '--trainer.strategy.class_path=DDPStrategy'"
    ),
    "--trainer.strategy DDPStrateg": (
        "unknown strategy 'DDPStrateg': did you mean '--trainer.strategy.class_path=DDPStrategy'?"
    ),
    "--trainer.strategy LocalSGDStrateg": (
        "unknown strategy 'LocalSGDStrateg': "
        "did you mean '--trainer.strategy.class_path=LocalSGDStrategy'?"
    ),
    "--trainer.strategy localsgd": "unknown strategy 'localsgd': did you mean 'local_sgd'?",
    "--trainer.strategy ddp --trainer.strategy.start_method fork": (
        "strategy 'ddp' takes no arguments: give them with its class, 'DDPStrategy'"
    ),
    # what is missing, or of the wrong type
    "--optimizer.alpha 0.1": (
        "option '--optimizer.alpha' is given without a class: name it in '--optimizer.class_path'"
    ),
    "--lr_scheduler StepLR": "StepLR needs '--lr_scheduler.step_size'",
    "--trainer.max_epochs three": (
        "invalid value 'three' for option '--trainer.max_epochs': expected int or null"
    ),
    "--optimizer MaSS --optimizer.alpha fast": (
        "invalid value 'fast' for option '--optimizer.alpha': expected float"
    ),
    "--optimizer torch.nn.Linear": (
        "invalid value 'torch.nn.Linear' for option '--optimizer': it is no subclass of Optimizer"
    ),
    "--ckpt_path absent.ckpt": "checkpoint 'absent.ckpt' does not exist: check the path",
}

REFUSED_BY_A_CONSTRUCTOR = {
    "--optimizer MaSS --optimizer.alpha 3": "Expected `alpha` to be in (0, 1], got 3.0. Try 0.05.",
    "--model.backbone DeepBackbone --model.backbone.depth 0": (
        "Expected `depth` to be positive, got 0. Try 1."
    ),
    "--trainer.callbacks+=Witness --trainer.callbacks.patience=-1": (
        "Expected `patience` to be at least 0, got -1. Try 0."
    ),
    "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.save_top_k=-5": (
        "Invalid value for save_top_k=-5. Must be >= -1"
    ),
    "--optimizer SGD --optimizer.lr -3": "Invalid learning rate: -3.0",
    "--trainer.profiler simpel": (
        "When passing string value for the `profiler` parameter of `Trainer`, "
        "it can only be one of ['simple', 'advanced', 'pytorch', 'xla']"
    ),
}

IN_YAML = {
    "modle: Descent": "unknown key 'modle' in run.yaml: did you mean 'model'?",
    "model: Descnt": ("unknown model 'Descnt' at 'model' in run.yaml: did you mean 'Descent'?"),
    "model: {class_path: Descnt}": (
        "unknown model 'Descnt' at 'model.class_path' in run.yaml: did you mean 'Descent'?"
    ),
    "data: {class_path: Numbrs}": (
        "unknown data module 'Numbrs' at 'data.class_path' in run.yaml: did you mean 'Numbers'?"
    ),
    "trainer: {max_epoch: 3}": (
        "unknown key 'trainer.max_epoch' in run.yaml: did you mean 'trainer.max_epochs'?"
    ),
    "trainer: {strategy: dpp}": (
        "unknown strategy 'dpp' at 'trainer.strategy' in run.yaml: did you mean 'ddp'?"
    ),
    "trainer: {strategy: DDPStrategy}": (
        "strategy 'DDPStrategy' at 'trainer.strategy' in run.yaml is a class: "
        "give it as 'strategy: {class_path: DDPStrategy}'"
    ),
    "trainer: {callbacks: [{class_path: Timer}, {class_path: ModelCheckpont}]}": (
        "unknown callback 'ModelCheckpont' at 'trainer.callbacks[1].class_path' in run.yaml: "
        "did you mean 'ModelCheckpoint'?"
    ),
    "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitr: x}}]}": (
        "unknown key 'trainer.callbacks[0].init_args.monitr' in run.yaml: "
        "did you mean 'trainer.callbacks[0].init_args.monitor'?"
    ),
    "optimizer: {class_path: lightning_sgd.Mass}": (
        "unknown optimizer 'lightning_sgd.Mass' at 'optimizer.class_path' in run.yaml: "
        "did you mean 'lightning_sgd.MaSS'?"
    ),
    "optimizer: {class_path: MaSS, init_args: {alhpa: 0.1}}": (
        "unknown key 'optimizer.init_args.alhpa' in run.yaml: "
        "did you mean 'optimizer.init_args.alpha'?"
    ),
    "optimizer: {class_path: MaSS, init_arg: {lr: 0.1}}": (
        "unknown key 'optimizer.init_arg.lr' in run.yaml: did you mean 'optimizer.init_args.lr'?"
    ),
    "optimizer: {class_path: MaSS, lr: 0.1}": (
        "unknown key 'optimizer.lr' in run.yaml: did you mean 'optimizer.init_args.lr'?"
    ),
    "optimizer: {class_pth: MaSS}": (
        "unknown key 'optimizer.class_pth' in run.yaml: did you mean 'optimizer.class_path'?"
    ),
    "optimizer: {class_path: MaSS, init_args: {lr: fast}}": (
        "invalid value 'fast' for key 'optimizer.init_args.lr' in run.yaml: expected float"
    ),
    "model: {class_path: Descent, init_args: {backbone: {class_path: DeepBackbon}}}": (
        "unknown class 'DeepBackbon' at 'model.init_args.backbone.class_path' in run.yaml: "
        "did you mean 'DeepBackbone'?"
    ),
    "optimizer: [MaSS": "config file 'run.yaml' is not YAML in line 1, column 17: "
    "expected ',' or ']', but got '<stream end>'",
    "": "config file 'run.yaml' holds no settings: expected lines `key: value`",
    "- MaSS": "config file 'run.yaml' holds no settings: expected lines `key: value`",
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    entry = {"strategy": SingleDeviceStrategy, "init_params": {}, "description": ""}
    monkeypatch.setitem(StrategyRegistry, "mixing_in_tests", entry)


@pytest.mark.parametrize(("words", "message"), ON_THE_COMMAND_LINE.items())
def test_on_the_command_line(complaint, words, message):
    assert complaint("fit", *MODEL, "--seed_everything", "0", *words.split()) == message


@pytest.mark.parametrize(("words", "message"), REFUSED_BY_A_CONSTRUCTOR.items())
def test_what_a_constructor_refuses_is_one_line_after_lightnings_own(
    command, capsys, words, message
):
    with pytest.raises(SystemExit) as stop:
        command("fit", *MODEL, "--seed_everything", "0", *words.split())
    assert stop.value.code == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last == f"lightning-sgd: error: {message}"
    assert not any("Traceback" in line or "usage" in line for line in before)


@pytest.mark.parametrize(("text", "message"), IN_YAML.items())
def test_in_yaml(complaint, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert complaint("fit", "--config", "run.yaml", *MODEL) == message


@pytest.mark.parametrize("command_name", ["validate", "test", "predict"])
def test_every_command_explains_itself(complaint, command_name):
    message = complaint(command_name, *MODEL, "--trainer.max_epoch", "3")
    assert message.endswith("did you mean '--trainer.max_epochs'?")


def test_a_class_in_yaml_and_its_argument_on_the_command_line(complaint, tmp_path):
    (tmp_path / "run.yaml").write_text("optimizer: {class_path: MaSS}")
    message = complaint("fit", "--config", "run.yaml", *MODEL, "--optimizer.alhpa", "1")
    assert message == "unknown option '--optimizer.alhpa': did you mean '--optimizer.alpha'?"


def test_arguments_in_yaml_belong_to_the_class_in_yaml(complaint, tmp_path):
    # The command line replaces the class: what the file says of SGD is not misspelt.
    (tmp_path / "run.yaml").write_text("optimizer: {class_path: SGD, init_args: {nesterov: true}}")
    message = complaint(
        "fit", "--config", "run.yaml", *MODEL, "--optimizer=MaSS", "--optimizer.z=1"
    )
    assert message == (
        "unknown option '--optimizer.z': see `lightning-sgd fit --optimizer.help MaSS`"
    )


@pytest.mark.parametrize("words", ["--optimizer.parms 1", "--optimizer.init_args.parms 1"])
def test_arguments_that_lightning_passes_are_not_suggested(complaint, words):
    message = complaint("fit", *MODEL, "--optimizer", "MaSS", *words.split())
    assert message == (
        f"unknown option '{words.split()[0]}': see `lightning-sgd fit --optimizer.help MaSS`"
    )


def test_a_callback_in_yaml_is_not_mistaken_for_one_on_the_command_line(complaint, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitor: loss}}]}"
    )
    message = complaint(
        *("fit", "--config", "run.yaml", *MODEL),
        *("--trainer.callbacks+=Timer", "--trainer.callbacks.duratio=1"),
    )
    assert message.endswith("did you mean '--trainer.callbacks.duration'?")


def test_the_section_of_a_command_in_a_config_before_it(complaint, tmp_path):
    (tmp_path / "all.yaml").write_text("fit: {modle: Descent}")
    message = complaint("--config", "all.yaml", "fit")
    assert message == "unknown key 'modle' in all.yaml: did you mean 'model'?"


@pytest.mark.parametrize(
    "words", [("fit", "--config", "mas.yaml"), ("--config", "mas.yaml", "fit")]
)
def test_a_missing_config_file(complaint, tmp_path, words):
    assert complaint(*words) == "config file 'mas.yaml' does not exist: check the path"
    (tmp_path / "mass.yaml").touch()
    assert complaint(*words) == "config file 'mas.yaml' does not exist: did you mean 'mass.yaml'?"


@pytest.mark.parametrize("words", ["--optimizer Quxquux", "--optimizer quux.Quxquux"])
def test_nothing_is_near_enough(complaint, words):
    message = complaint("fit", *MODEL, *words.split())
    assert message.startswith(f"unknown optimizer '{words.split()[1]}': see `lightning-sgd list`")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import absent_library", "ModuleNotFoundError: No module named 'absent_library'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(
    complaint, tmp_path, monkeypatch, source, reason
):
    # "Unknown model" would send the user looking for a misspelling that is not there.
    (tmp_path / "my_models.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    message = complaint("fit", "--model", "my_models.Net")
    assert message == f"'my_models.Net' cannot be imported: {reason}"


def test_a_search_that_fails_does_not_hide_the_message(complaint, monkeypatch):
    monkeypatch.setattr("lightning_sgd.cli.diagnosis.known_classes", None)
    message = complaint("fit", *MODEL, "--trainer.max_epochs", "three")
    assert message == (
        "invalid value 'three' for option '--trainer.max_epochs': expected int or null"
    )


def test_an_unheard_of_strategy_lists_those_of_lightning(complaint):
    message = complaint("fit", *MODEL, "--trainer.strategy", "zzzz")
    assert message.startswith(
        "unknown strategy 'zzzz': see `lightning-sgd list`; Lightning has auto,"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fit", "`lightning-sgd fit` needs '--model'"),
        ("fit --wibble 3", "unknown option '--wibble': see `lightning-sgd fit --help`"),
        ("fit stray", "unrecognized arguments: stray"),
        ("fit --optimizer", "argument --optimizer: expected one argument"),
        ("fit --optimizer sgd.yaml", "config file 'sgd.yaml' does not exist: check the path"),
    ],
)
def test_other_mistakes_are_one_line_too(complaint, words, message):
    assert complaint(*words.split()) == message


def test_a_message_of_another_wording_is_cut_to_its_first_telling_line():
    # jsonargparse may change its sentences with any release.
    message = 'Parser key "model":\n  - Does not validate against any of the Union\n  - No such luck\n  more'
    assert one_line(message, [], "fit") == "'model': No such luck"
    assert one_line("Entirely new\nin two lines", [], "fit") == "Entirely new"
    assert one_line("", [], "fit") == "these settings are not valid"


def test_options_are_read_as_lightning_cli_reads_them():
    line = "fit --a.b=1 --c -2 --list+=X --list.k v --list+ Y --list.k.l w -z 0"
    settings = read_settings(line.split(), "fit")
    assert [(setting.path, setting.value) for setting in settings] == [
        (("a", "b"), 1),
        (("c",), -2),
        (("list", 0), "X"),
        (("list", 0, "k"), "v"),
        (("list", 1), "Y"),
        (("list", 1, "k", "l"), "w"),
        (("z",), 0),
    ]


def test_configs_that_are_no_local_files_are_left_to_lightning_cli():
    assert read_settings(["--config", "s3://bucket/run.yaml"], "fit") == []
    inline = read_settings(["--config", '{"fit": {"a": [1]}}'], "fit")
    assert inline == [Setting(("a", 0), 1, '{"fit": {"a": [1]}}')]


def test_parsers_still_name_their_keys_in_the_way_that_the_search_needs():
    # The search reads `dest` and `_typehint` of the actions; a jsonargparse without them must fail here.
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--a.b", type=int | None)
    action = next(action for action in parser._actions if action.dest == "a.b")
    assert action._typehint == int | None
