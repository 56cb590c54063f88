"""Wrong command lines, settings and files: each gives a single line that says what is wrong.

Most run in this process, through the same `cli.run` as on the command line; a few run in separate
processes.
"""

import os
import pickle
import shlex

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from training import cli, launch
from training.compose import compose_config

from app import run_app
from helpers import ROOT, TINY, call, check_line, everything_below, refused, slow, thorough


@pytest.fixture
def stops(monkeypatch, tmp_path, capfd, steps):
    """A function that runs train.py with wrong arguments and returns its one-line error.

    It checks that the exit code is 2, no step was taken, and ``tmp_path`` is unchanged.
    """

    # The parent folder of runs. Hydra would create it, and train.py does not remove it.
    (tmp_path / "outputs").mkdir()

    def go(*words):
        before = everything_below(tmp_path)
        monkeypatch.chdir(tmp_path)
        line = refused(capfd, cli.run, *words)
        assert steps == []
        assert everything_below(tmp_path) == before
        return line

    return go


# Arguments added to the settings of a tiny run, and the expected text of the error and its fix.
SETTINGS = [
    # types
    ("epochs=ten", "epochs: Value 'ten' of type 'str' could not be converted to Integer"),
    ("batch_size=1e9", "batch_size: Value '1000000000.0' of type 'float' could not be converted"),
    ("optim.lr=fast", "optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
    ("attention.dk=many", "attention.dk: Value 'many' of type 'str' is incompatible"),
    ("attention.stages=all", "attention.stages: Invalid value assigned: str is not a ListConfig"),
    ("model.widths=[4,8,eight]", "model.widths[2]: Value 'eight' of type 'str' could not be"),
    ("precision=fp8", "precision: Invalid value 'fp8', expected one of [auto, fp32, bf16, fp16]"),
    # keys and groups
    ("epoch=3", "epoch: unknown setting epoch; there are model, attention"),
    ("optim.lrr=1", "optim.lrr: unknown setting lrr; optim=adamw has lr, betas, weight_decay"),
    ("attention=se attention.dk=3", "unknown setting dk; attention=se has ratio"),
    ("attention=none attention.dk=3", "unknown setting dk; attention=none has no settings"),
    (
        "+experiment=mine",
        "+experiment=mine: experiment is already in the defaults; write exp",
    ),
    ("++optim=sgd", "optim is already in the defaults; write optim=sgd"),
    ("optim={'lr':-1}", "optim.lr=-1.0 must be above 0"),
    ("optim={'speed':1}", "optim.speed: unknown setting speed; optim=adamw has lr"),
    ("hydra.sweeper.params.nothing=1", "Unexpected type for root: NoneType (given: "),
    ("+hydra.sweeper.params=[1]", "hydra.sweeper.params: Cannot merge DictConfig with List"),
    ("hydra.sweeper.params=text", "hydra.sweeper.params: Cannot assign str to Dict"),
    (f"freeze={'{a:' * 300}1{'}' * 300}", "values or folders are nested too deeply"),
    ("++optim.momentum=0.9", "optim.momentum: unknown setting momentum; optim=adamw has lr"),
    ("~epochs", "epochs cannot be removed; leave out ~epochs"),
    ("~attention", "attention has no value; give attention=..."),
    ("~nothing", "Could not delete from config. 'nothing' does not exist"),
    ("model=resnet9", "Could not find 'model/resnet9' Available options in 'model': alternet18"),
    ("model=null", "Config group override must be a string or a list. Got NoneType (given: "),
    ("attention=[aa,se]", "a run takes one option of attention; -m attention=aa,se runs each"),
    # Hydra's grammar
    ("attention", "attention: settings are NAME=VALUE"),
    ("resume=a/seed=0", "; quote such text for Hydra and for the shell: \"resume='a/seed=0'\""),
    ("name=a=b", "for Hydra and for the shell: \"name='a=b'\""),
    ("data.root=a(b", "for Hydra and for the shell: \"data.root='a(b'\""),
    ("hydra.run.dir=a=$x", "for Hydra and for the shell: 'hydra.run.dir='"),
    ("epochs=3=4", "epochs=3=4: mismatched input '=' expecting <EOF>\n"),
    ("model.widths=[4,8", "model.widths=[4,8: no viable alternative at input"),
    (
        "attention._target_=os.system",
        "attention._target_=os.system cannot be set; choose another option of the group attention",
    ),
    ("optim._partial_=false", "optim._partial_=False cannot be set; choose another option of the"),
    ("+data._convert_=all", "data._convert_: unknown setting _convert_; data has train_size"),
    ("seed=0,1", "Ambiguous value for argument 'seed=0,1'"),
    ("seed=${nothing}", "Interpolation key 'nothing' not found"),
    ("seed=${oc.env:NOT_SET_ANYWHERE}", "Environment variable 'NOT_SET_ANYWHERE' not found"),
    ("--epochs=3", "unrecognized arguments: --epochs=3; settings are NAME=VALUE"),
    ("-m seed=0,1", "unrecognized arguments: seed=0,1; settings are NAME=VALUE, and options"),
    ("--cfg=jobs", "invalid choice: 'jobs'"),
    ("--config-name=other", "--config-name=other: all settings are in config; leave it out"),
    ("-cn=experiment/cpu.yaml", "is one option of a group; write experiment=cpu"),
    # depth
    (
        "model.widths=" + "[" * 300 + "]" * 300,
        "values or folders are nested too deeply",
    ),
    ("freeze=" + "[" * 300, "[[: no viable alternative at input '[["),
    ("out_dir=" + "d/" * 1500, "values or folders are nested too deeply"),
    # sizes
    ("epochs=0", "epochs=0 must be at least 1 and at most 1,000,000"),
    ("epochs=99999999999999999999", "epochs=99999999999999999999 must be at least 1 and at most"),
    ("batch_size=97", "batch_size=97 does not fit 96 training images; give 1 to 96"),
    ("grad_accum=5", "batch_size=32 must be divisible by grad_accum=5"),
    ("eval_batch_size=99999999999999999999", "eval_batch_size=99999999999999999999 must be"),
    ("seed=-1", "seed=-1 must be at least 0"),
    ("data.train_size=0", "data.train_size=0 must be at least 1"),
    ("data.train_size=10000000000000", "data.train_size=10000000000000 must be at least 1 and at"),
    ("data.val_size=96", "val_size=96 cannot be held out of 96 training images"),
    ("augmentation.crop_pad=32", "crop_pad=32 could crop away a whole image of 32x32; give less"),
    ("augmentation.cutout=33", "cutout=33 is larger than an image of 32x32; give at most 32"),
    ("augmentation.flip=both", "flip=both is unknown; give false, true or alternating"),
    ("augmentation.flip=2", "augmentation.flip: Value '2' of type 'int' is incompatible with type"),
    ("augmentation.padding=edge", "padding=edge is unknown; give zeros or reflect"),
    ("augmentation.padding=reflect", "padding=reflect needs augmentation.crop_pad above 0"),
    ("augmentation.policy=random", "policy=random is unknown; give null, trivial, rand or auto"),
    ("augmentation.rand_ops=0", "augmentation.rand_ops=0 must be at least 1 and at most 14"),
    ("augmentation.cutmix=true", "augmentation.cutmix: Value 'True' of type 'bool' could not be"),
    # numbers
    ("optim.lr=0", "optim.lr=0.0 must be above 0"),
    ("optim.lr=nan", "optim.lr=nan must be finite and above 0"),
    ("optim.lr=1e39", "optim.lr=1e+39 must be above 0 and at most 1e+30"),
    (
        "optim.weight_decay=1e38",
        "optim.weight_decay=1e+38 must be at least 0 and at most 1,000,000",
    ),
    ("grad_clip=3.5e38", "grad_clip=3.5e+38 must be above 0 and at most 1e+30, or null"),
    ("optim.betas=[0.9]", "optim.betas=[0.9] must be 2 numbers, each at least 0 and below 1"),
    ("optim=sgd optim.momentum=0", "optim.nesterov=true needs an optim.momentum above 0"),
    ("schedule.warmup=2", "schedule.warmup=2.0 must be at least 0 and at most 1"),
    (
        "schedule=warmup_cosine schedule.warmup=1",
        "schedule.warmup=1.0 must be at least 0 and below",
    ),
    ("label_smoothing=1", "label_smoothing=1.0 must be at least 0 and below 1"),
    (
        "class_weights=equal",
        "class_weights=equal must be null, balanced, or a list with one number",
    ),
    ("class_weights={a:1}", "class_weights={'a': 1} must be null, balanced, or a list"),
    ("class_weights=[1,x]", "class_weights=[1, 'x'] must be null, balanced, or a list"),
    ("class_weights=[1,0]", "class_weights=[1, 0] must be above 0"),
    ("class_weights=[1,2]", "class_weights has 2 numbers for 8 classes"),
    ("grad_clip=0", "grad_clip=0.0 must be above 0, or null"),
    ("ema=1", "ema=1.0 must be above 0 and below 1, or null"),
    ("ema=nan", "ema=nan must be finite and above 0 and below 1, or null"),
    # the network and its attention
    ("attention.dk=0", "attention in stage 2: dk=0 must be at least 1"),
    ("attention.dk=7", "attention in stage 2: dk=7 must be divisible by Nh=4"),
    ("attention.dk=nan", "attention.dk=nan is a fraction of the layer's output, which must be"),
    ("attention.dk=16.0", "which must be above 0 and at most 2; write 16 for channels"),
    ("attention.dk=1e9", "which must be above 0 and at most 2; write an int such as 16"),
    ("attention.dk=1", "attention.dk=1 means 1 of the channels; write 1.0 for 1 times"),
    ("attention.dk=2", "attention.dk=2 means 2 of the channels; write 2.0 for 2 times"),
    ("attention.dk=1 attention.Nh=1", "attention.dk=1 means 1 of the channels; write 1.0 for 1"),
    ("attention.min_dkh=1000000000", "attention.dk=0.5, attention.min_dkh=1000000000 smaller"),
    ("attention.dk=1000000000000000000", "would have more than 1e+10 parameters; make one of"),
    ("attention.dv=0", "attention.dv=0 removes attention entirely; use attention=none"),
    ("attention.dv=7", "attention in stage 2: dv=7 must be divisible by Nh=4"),
    ("attention.dv=64", "attention in stage 2: dv=64 must lie between 0 and out_channels=8"),
    ("attention.dv=1", "attention.dv=1 means 1 of the channels; write 1.0 for 1 times"),
    ("attention.dv=1.5", "which must be above 0 and at most 1; write 2 for channels"),
    ("attention.Nh=0", "attention.Nh=0 must be at least 1"),
    ("attention.position=absolute", "attention.position=absolute is unknown; choose one of"),
    ("attention.stages=[]", "attention.stages=[] must be some of the network's stages 1 to 3"),
    ("attention.stages=[4]", "attention.stages=[4] must be some of the network's stages 1 to 3"),
    ("attention.backend=cudnn", "backend='cudnn' is unknown; choose one of auto"),
    ("attention=se attention.ratio=0", "attention.ratio=0 must be at least 1"),
    ("model.depths=[1,1]", "depths=[1, 1] and widths=[4, 8, 8] must be equally long"),
    ("model.depths=[1,1,1000000]", "model.depths=[1, 1, 1000000] must not be more than 1000"),
    ("model.widths=[4,8,1000000000]", "model.widths=[4, 8, 1000000000]"),
    ("model.stem=0", "stem=0"),
    ("model.block=dense", "block=dense must be one of basic, bottleneck, preact"),
    ("freeze=[stem]", "freeze=stem is not a module of the network; choose from conv, bn_in"),
    ("keep_best=true", "keep_best=true needs held-out images, data.val_size=N: a test set"),
    # where it runs and what it is called
    ("device=tpu", "device=tpu is not a device; use auto, cpu or cuda"),
    ("device=mps", "device=mps is not available here; use auto or cpu"),
    ("device=cuda:9", "device=cuda:9"),
    ("name=", "name= must not be empty: it names a folder"),
    ("model.name=", "model.name= must not be empty: results are listed by it"),
    ("resume='~no-such-user/x'", "resume=~no-such-user/x: there is no checkpoint"),
    ("run_dir=", "run_dir= must not be empty: it names a folder"),
    ("wandb.mode=offline wandb.project=a/b", "wandb.project=a/b must be a name without /"),
    # resuming
    (
        "resume=nowhere",
        "resume=nowhere: there is no checkpoint; resume=auto continues the run's own, if any",
    ),
]


@pytest.mark.parametrize(
    ("words", "line"),
    [case if index % 10 == 0 else slow(*case) for index, case in enumerate(SETTINGS)],
    ids=[words[:60] for words, _ in SETTINGS],
)
def test_a_wrong_setting(stops, monkeypatch, words, line):
    # Skip Hydra's first composition, which only finds out whether this is a sweep.
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)
    assert line in stops(*TINY, *words.split())


@pytest.mark.parametrize(
    "value",
    [
        "a/seed=0",
        "it's",
        'a "b" $HOME `x` !',
        "back\\slash\\",
        "a\\'b",
        "{x:1},[2](3)",
        "ü 大",
        "null",
        "a\nb",
    ],
)
def test_what_is_printed_to_be_pasted_is_read_as_it_was_meant(value):
    (word,) = shlex.split(launch.shell_override("resume", value))
    override = OverridesParser.create().parse_override(word)
    assert override.value() == value
    assert compose_config([word]).resume == value


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(stops):
    assert "device=cuda, but torch finds no GPU here; use device=cpu" in stops(*TINY, "device=cuda")


def test_a_wrong_value_in_a_sweep_leaves_nothing(stops):
    line = stops("-m", *TINY, "seed=range(0,3")
    assert "seed=range(0,3: no viable alternative at input" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        slow("seed=0,abc", "seed: Value 'abc' of type 'str' could not be converted to Integer"),
        ("attention=none,ae", "Could not find 'attention/ae'"),
    ],
)
def test_a_sweep_of_which_one_does_not_compose_runs_none(tmp_path, capfd, words, line):
    (tmp_path / "lookup").mkdir()
    (tmp_path / "lookup" / "multirun.yaml").write_text("of the one before")
    before = everything_below(tmp_path)
    assert line in refused(capfd, cli.run, "-m", *TINY, words, f"out_dir={tmp_path}")
    assert everything_below(tmp_path) == before


# ---- folders and files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["out_dir=file"], "File exists: 'file'; choose a writable folder"),
        slow(["out_dir=file/below"], "Not a directory: 'file/below'; choose a writable folder"),
        slow(["run_dir=file"], "Not a directory: "),
        slow(["out_dir="], "out_dir= must not be empty: it names a folder"),
        (["out_dir=null"], "out_dir: field 'out_dir' is not Optional"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_folder_that_cannot_be(stops, tmp_path, words, line):
    (tmp_path / "file").write_bytes(b"")
    assert line in stops(*TINY, *words)


def test_the_folder_one_stands_in_is_not_removed(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    refused(capfd, cli.run, *TINY, "hydra.run.dir=.", "epochs=0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", *map(slow, (b"hello\n", b"PK\x03\x04" + bytes(1000), pickle.dumps(["a list"])))],
)
def test_a_checkpoint_that_is_none(stops, tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    for place in (".", "last.pt"):
        line = stops(*TINY, f"resume={place}")
        assert "last.pt" in line
        assert "no readable checkpoint" in line


def cifar_folder(root, name="data_batch_1", content=b"no pickle"):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("make", "words", "line"),
    [
        (None, ["data=cifar100"], "no CIFAR100 in"),
        slow(None, ["data=cifar100", "data.root=missing"], "set data.root=... to the folder that"),
        (None, ["data=cifar100", "data.name=cifar1000"], "data.name=cifar1000 is unknown; choose"),
        slow(None, ["data=cifar100", "data.root=file"], "no CIFAR100 in"),
        (cifar_folder, ["data=cifar10"], "missing or damaged files (data_batch_1, data_batch_2"),
    ],
    ids=["absent", "no-root", "name", "file-as-root", "damaged"],
)
def test_data_that_are_not_there_or_damaged(stops, tmp_path, make, words, line):
    (tmp_path / "file").write_bytes(b"")
    if make:
        make(tmp_path)
    root = [] if any("root" in word for word in words) else ["data.root=."]
    assert line in stops(*words, *root, "data.download=false", "tracking=csv")


@pytest.mark.parametrize(
    "said",
    [
        None,
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_what_cannot_be_allocated_is_one_line(stops, monkeypatch, said):
    """On a GPU, not all of these errors are an OutOfMemoryError."""

    def build(*_, **__):
        if said is not None:
            raise getattr(torch, "AcceleratorError", RuntimeError)(said)
        torch.empty(2**60)

    monkeypatch.setattr("training.assemble.build_model", build)
    line = stops(*TINY)
    assert "not enough memory" in line
    assert "a smaller batch_size" in line


def test_a_mistake_of_the_program_is_not_dressed_up(monkeypatch, tmp_path):
    def build(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("training.assemble.build_model", build)
    with pytest.raises(RuntimeError, match="a bug"):
        call(cli.run, *TINY, f"out_dir={tmp_path}")


# ---- separate processes -------------------------------------------------------------------------


def process(*words, cwd, **environment):
    return run_app([ROOT / "train.py", *words], cwd=cwd, env={**os.environ, **environment})


@pytest.mark.parametrize(
    "words", [slow("epochs=0"), *map(thorough, ("model=resnet9", "--epochs=3", "device=cuda:99"))]
)
def test_the_real_command(tmp_path, words):
    done = process(*TINY, words, cwd=tmp_path)
    assert done.returncode == 2
    check_line(done.stderr)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "outputs"])
    assert not list(tmp_path.glob("outputs/*"))


@pytest.mark.slow
def test_a_full_traceback_on_request(tmp_path):
    done = process(*TINY, "epochs=0", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "epochs=0 must be at least 1" in done.stderr
    assert not list(tmp_path.glob("outputs/*"))


@pytest.mark.slow
def test_no_traceback_in_a_process_that_a_launcher_starts(tmp_path):
    """It inherits variables that train.py sets for itself and those that the user set."""
    environment = {"HYDRA_FULL_ERROR": "1", "AACONV_FULL_ERROR": "0"}
    done = process(*TINY, "epochs=0", cwd=tmp_path, **environment)
    assert done.returncode == 2
    check_line(done.stderr)
