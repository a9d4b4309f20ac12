"""torchqat.distill: taps that leave nothing behind, connectors, the FAQD loss, and what ties them up."""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
import torchqat
from small_nets import assert_same
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchqat.distill import Connector, Distiller, FAQDLoss, FeatureTaps, LazyConnector, resize_like
from torchqat.nn import FastFeatureAffinityLoss, FeatureAffinityLoss


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    """(B, 1, 8, 8) to 5 logits."""

    def __init__(self, width=4, stride=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, width, 3, stride)
        self.block = Block(width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.pool(self.block(self.stem(x))).flatten(1))


def images(seed=0, size=6):
    return torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


TAPS = {"stem": "stem", "block.relu": "block"}


def distiller(loss=None, student=None, teacher=None, taps=TAPS, **options):
    student = Net() if student is None else student
    teacher = Net(6, seed=1).eval() if teacher is None else teacher
    return Distiller(student, teacher, taps, FAQDLoss(lambda_label=0) if loss is None else loss, **options)


def hooks_in(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def reloaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), reloaded], ids=["copy", "pickle", "file"]
)


# ---- taps ----


def test_taps_return_what_the_modules_returned():
    model, x = Net(), images()
    logits, features = FeatureTaps(model, ["block.bn", "stem"])(x)
    stem = model.stem(x)
    assert list(features) == ["block.bn", "stem"]
    torch.testing.assert_close(features["stem"], stem, rtol=0, atol=0)
    torch.testing.assert_close(features["block.bn"], model.block.bn(model.block.conv(stem)))
    torch.testing.assert_close(logits, model(x))
    features["block.bn"].square().sum().backward()
    assert model.block.conv.weight.grad.abs().sum() > 0 and model.head.weight.grad is None


def test_the_hooks_go_when_they_are_told_to():
    model = Net()
    other = model.stem.register_forward_hook(lambda *_: None)
    with FeatureTaps(model, TAPS) as taps:
        assert hooks_in(model) == 3
        taps(images())
    assert hooks_in(model) == 1
    taps.remove()
    with pytest.raises(RuntimeError, match="FeatureTaps: the hooks are removed"):
        taps(images())
    with pytest.raises(ZeroDivisionError), FeatureTaps(model, TAPS):
        raise ZeroDivisionError
    assert hooks_in(model) == 1
    other.remove()


def test_the_hooks_go_with_the_taps():
    model = Net()
    taps = FeatureTaps(model, TAPS)
    twin = copy.deepcopy(taps)
    del taps
    assert hooks_in(model) == 0
    other = twin.model
    assert hooks_in(other) == 2 and set(twin(images())[1]) == set(TAPS)
    del twin
    assert hooks_in(other) == 0


def test_nothing_is_kept_when_the_model_raises():
    model, seen = Net(), []
    taps = FeatureTaps(model, ["stem", "block"])
    watch = model.stem.register_forward_hook(lambda _m, _a, output: seen.append(weakref.ref(output)))
    head, model.head = model.head, nn.Linear(3, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        taps(images())
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
    model.head = head
    watch.remove()
    assert set(taps(images())[1]) == {"stem", "block"}


def test_nothing_is_kept_afterwards_nor_in_other_calls():
    model, seen = Net(), []
    taps = FeatureTaps(model, ["stem"])
    model.stem.register_forward_hook(lambda _m, _a, output: seen.append(weakref.ref(output)))
    taps(images())
    model(images())
    with torch.no_grad():
        model(images())
    gc.collect()
    assert [reference() for reference in seen] == 3 * [None]


def test_a_recomputation_in_backward_is_not_collected():
    model = Net()
    block, calls = model.block, []
    model.block.forward = lambda x: checkpoint(type(block).forward, block, x, use_reentrant=False)
    model.block.conv.register_forward_hook(lambda *_: calls.append(0))
    taps = FeatureTaps(model, ["block.conv"])
    logits, features = taps(images())
    (logits.sum() + features["block.conv"].square().sum()).backward()
    assert len(calls) == 2 and set(taps(images())[1]) == {"block.conv"}


@pytest.mark.parametrize(
    "path, nearest",
    [("blok.relu", "block.relu"), ("block.0", "block"), ("hed", "head"), ("module.stem", "stem")],
)
def test_a_path_that_does_not_exist_gets_a_suggestion(path, nearest):
    model = Net()
    message = f"FeatureTaps: Net has no module '{path}'; the nearest name is '{nearest}'"
    with pytest.raises(ValueError, match=message):
        FeatureTaps(model, ["stem", path])
    assert hooks_in(model) == 0


class Odd(nn.Module):
    """A module called twice, one never, one that returns a tuple, one whose result is overwritten."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.overwritten = nn.ReLU(), nn.ReLU(), nn.Linear(4, 4)
        self.tuple = nn.LSTM(4, 4)

    def forward(self, x):
        x, _ = self.tuple(self.twice(self.twice(x)))
        return F.relu_(self.overwritten(x))


@pytest.mark.parametrize(
    "path, error, message",
    [
        ("twice", RuntimeError, "'twice' must be called once in a forward, got 2 calls"),
        ("never", RuntimeError, "'never' must be called once in a forward, got no call"),
        ("tuple", TypeError, "'tuple' must return a tensor, got tuple"),
        ("overwritten", RuntimeError, "the result of 'overwritten' was changed in place"),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_features_that_cannot_be_had_are_named(path, error, message, mode):
    with pytest.raises(error, match=f"FeatureTaps: {message}"), mode():
        FeatureTaps(Odd(), [path])(torch.randn(3, 2, 4))


def test_taps_work_in_inference_mode():
    with torch.inference_mode():
        assert FeatureTaps(Net(), ["stem"])(images())[1]["stem"].is_inference()


def test_one_string_is_no_list_of_paths():
    with pytest.raises(TypeError, match="paths must be a list of names, got the string 'stem'"):
        FeatureTaps(Net(), "stem")
    with pytest.raises(TypeError, match="paths must be a list of names, got 2 in it"):
        FeatureTaps(Net(), [2])
    with pytest.raises(TypeError, match="FeatureTaps: model must be a torch.nn.Module, got NoneType"):
        FeatureTaps(None, ["stem"])


@COPIES
def test_a_copied_model_collects_nothing_and_copied_taps_work(way):
    model = Net()
    taps = FeatureTaps(model, TAPS)
    seen = []
    twin = way(model)
    twin.stem.register_forward_hook(lambda _m, _a, output: seen.append(weakref.ref(output)))
    twin(images())
    gc.collect()
    assert seen[0]() is None
    (_, want), other = taps(images()), way(taps)
    assert_same(other(images())[1], want)
    other.remove()
    assert hooks_in(other.model) == 0 and hooks_in(model) == 2


# ---- compiled, wrapped ----


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_model_is_tapped_without_a_graph_break(way):
    torch._dynamo.reset()
    counters.clear()
    model, x = Net(), images()
    want = FeatureTaps(Net(), TAPS)(x)
    options = {"backend": "aot_eager", "fullgraph": True}
    taps = FeatureTaps(torch.compile(model, **options) if way == "wrapped" else model, TAPS)
    if way == "in place":
        model.compile(**options)
    for _ in range(3):
        logits, features = taps(x)
        torch.testing.assert_close((logits, features), want)
    features["block.relu"].sum().backward()
    assert model.stem.weight.grad is not None
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(taps.model(x), want[0])


@COPIES
def test_tapped_compiled_students_copy(way):
    torch._dynamo.reset()
    student = Net()
    compiled = torch.compile(student, backend="eager")
    model = distiller(student=compiled)
    want = model(images())
    for copied in (way(student), way(compiled)):
        torch.testing.assert_close(copied(images()), want.logits)
    twin = way(model)
    assert_same(list(twin(images()).terms)[:3], list(want.terms)[:3])
    assert twin.student_taps.model is twin.student
    twin.remove()
    assert hooks_in(twin.student) == 0 and hooks_in(student) == 2


def test_taps_that_a_compiled_model_does_not_see_say_so():
    torch._dynamo.reset()
    compiled = torch.compile(Net(), backend="eager")
    compiled(images())
    with pytest.raises(RuntimeError, match="'stem' must be called once .* must be tapped before its first"):
        FeatureTaps(compiled, ["stem"])(images())


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_students_in_ddp(process_group):
    ddp, connector = nn.parallel.DistributedDataParallel, Connector(4)
    plain = distiller(connectors={"stem": copy.deepcopy(connector)})
    wrapped = distiller(student=ddp(Net()), connectors={"stem": ddp(connector)})
    for model in (plain, wrapped):
        model(images()).loss.backward()
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("part", ["student", "teacher", "whole"])
def test_a_compiled_distiller_computes_the_same(part):
    torch._dynamo.reset()
    eager, model = (distiller(connectors={"stem": nn.Identity()}) for _ in range(2))
    (model if part == "whole" else getattr(model, part)).compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        want, got = eager(images()), model(images())
        torch.testing.assert_close(got, want)
        want.loss.backward()
        got.loss.backward()
    torch.testing.assert_close(model.student.stem.weight.grad, eager.student.stem.weight.grad)


# ---- connectors and grids ----


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_connector_is_a_1x1_convolution(rank, relu, device):
    connector = Connector(4, 3, relu=relu).to(device)
    x = torch.randn(2, 4, *range(3, 3 + rank), device=device)
    want = torch.einsum("oc,bc...->bo...", connector.weight, x) + connector.bias.view(-1, *[1] * rank)
    torch.testing.assert_close(connector(x), want.relu() if relu else want)
    assert relu == bool((connector(x) >= 0).all())


def test_a_connector_keeps_channels_last_and_as_many_channels_as_come():
    connector = Connector(4)
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    assert connector(x).is_contiguous(memory_format=torch.channels_last) and connector(x).shape == x.shape
    assert connector.weight.abs().max() <= 0.5 and connector.weight.std() > 0.2  # U(-b, b), b = 1 / sqrt(4)


def test_a_lazy_connector_takes_its_channels_from_the_first_features():
    lazy = LazyConnector(7, relu=True)
    parameters = list(lazy.parameters())
    state = copy.deepcopy(lazy)(torch.ones(1, 4, 2)) is None
    assert lazy(torch.ones(1, 4, 2)).shape == (1, 7, 2) and not state
    assert type(lazy) is Connector and repr(lazy) == "Connector(4, 7, relu=True)"
    assert [id(p) for p in lazy.parameters()] == [id(p) for p in parameters]
    assert lazy.weight.abs().max() <= 0.5 and lazy.weight.std() > 0.2
    other = LazyConnector()
    assert repr(other) == "LazyConnector(relu=False)"
    other.load_state_dict(lazy.state_dict())
    assert torch.equal(other.weight, lazy.weight)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: Connector(0), "Connector: in_channels must be at least 1, got 0"),
        (lambda: Connector(3, 0), "Connector: out_channels must be at least 1, got 0"),
        (lambda: LazyConnector(0), "LazyConnector: out_channels must be at least 1, got 0"),
        (lambda: Connector(3)(torch.ones(2, 4, 5)), r"shape \(B, 3, \*spatial\) .*, got \[2, 4, 5\]"),
        (lambda: Connector(3)(torch.ones(2, 3)), r"with 1 to 3 spatial dimensions, got \[2, 3\]"),
        (
            lambda: resize_like(torch.ones(1, 2, 3), torch.ones(1, 2, 3, 4)),
            r"got \[1, 2, 3\] and \[1, 2, 3, 4\]",
        ),
        (
            lambda: resize_like(torch.ones(6 * [2]), torch.ones(6 * [3])),
            "1 to 3, as those they are fitted to",
        ),
    ],
)
def test_features_and_channels_that_do_not_fit_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: Connector(4.0), "Connector: in_channels must be an int, got 4.0"),
        (lambda: Connector(4, "8"), "Connector: out_channels must be an int, got '8'"),
        (lambda: LazyConnector(True), "LazyConnector: out_channels must be an int, got True"),
        (lambda: Connector(3)(None), "Connector: features must be a tensor, got NoneType"),
        (lambda: LazyConnector()([]), "Connector: features must be a tensor, got list"),
        (lambda: resize_like(None, torch.ones(1, 2, 3)), "resize_like: features must be a tensor, got None"),
        (lambda: resize_like(torch.ones(1, 2, 3), 3), "resize_like: like must be a tensor, got int"),
    ],
)
def test_what_is_no_number_or_tensor_is_named(wrong, message):
    with pytest.raises(TypeError, match=message):
        wrong()


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("rank, mode", [(1, "linear"), (2, "bilinear"), (3, "trilinear")])
def test_resizing_is_linear_interpolation(rank, mode, align_corners):
    x, like = torch.randn(2, 3, *[4] * rank), torch.randn(2, 5, *range(6, 6 + rank))
    want = F.interpolate(x, like.shape[2:], mode=mode, align_corners=align_corners)
    assert torch.equal(resize_like(x, like, align_corners=align_corners), want)
    if align_corners:
        assert torch.equal(resize_like(x, like), want)
    assert resize_like(x, x) is x


# ---- the loss ----


def pairs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(3, c, 4, 5, generator=generator) for c in (2, 6)) for _ in range(2)]


def test_the_loss_is_that_of_the_formula():
    s, t = torch.randn(2, 3, 7, dtype=torch.float64).unbind()
    labels = torch.tensor([0, 6, 3])
    features = pairs()
    affinity = sum(FeatureAffinityLoss()(a, b) for a, b in features)
    entropy = -(s.exp() / s.exp().sum(1, keepdim=True)).log()[range(3), labels].mean()
    square = ((s - t) ** 2).sum() / 21
    result = FAQDLoss()(s, t, features, labels)
    torch.testing.assert_close(result.loss, square + 10 * affinity + 0.3 * entropy)
    torch.testing.assert_close(result[1:], (square, affinity, entropy))
    p, q = ((x / 3).exp() / (x / 3).exp().sum(1, keepdim=True) for x in (t, s))
    divergence = 9 * (p * (p / q).log()).sum() / 3
    result = FAQDLoss(2.0, 0.5, 4.0, kd="kl", temperature=3.0)(s, t, iter(features), labels)
    torch.testing.assert_close(result.loss, 2 * divergence + 0.5 * affinity + 4 * entropy)


def test_the_default_weight_is_the_authors_for_batches_of_100():
    student, teacher = torch.randn(2, 100, 3, 2, 2).unbind()
    theirs = 0.1 * FeatureAffinityLoss(reduction="sum")(student, teacher)
    ours = FAQDLoss(lambda_kd=0, lambda_label=0)(torch.zeros(1, 2), features=[(student, teacher)]).loss
    torch.testing.assert_close(ours, theirs)


class Untouchable:
    """Labels that nothing may be done with."""

    def __getattribute__(self, name):
        raise AssertionError(f"the labels were read: {name}")

    def __bool__(self):
        raise AssertionError("the labels were read")

    __len__ = __iter__ = __eq__ = __bool__

    @classmethod
    def __torch_function__(cls, *_args, **_kwargs):
        raise AssertionError("the labels were read")


def test_labels_of_weight_0_are_never_read():
    result = distiller()(images(), Untouchable())
    assert result.terms.label is None and result.loss.isfinite()
    with pytest.raises(AssertionError, match="the labels were read"):
        distiller(FAQDLoss())(images(), Untouchable())


def test_terms_of_weight_0_need_nothing():
    logits = torch.randn(3, 5, requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    result = FAQDLoss(lambda_kd=0, lambda_fa=0)(logits, labels=labels)
    assert result.kd is None and result.fa is None
    torch.testing.assert_close(result.loss, 0.3 * F.cross_entropy(logits, labels))
    assert not result.label.requires_grad and result.loss.requires_grad


@pytest.mark.parametrize("kd", ["mse", "kl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(kd, dtype):
    s, t = (100 * torch.randn(2, 4, 9)).to(dtype).unbind()
    criterion = FAQDLoss(lambda_fa=0, lambda_label=0, kd=kd)
    assert criterion(s, t).loss.dtype == torch.float32
    torch.testing.assert_close(criterion(s, t).loss, criterion(s.float(), t.float()).loss)


def test_dense_logits_are_averaged_over_their_pixels():
    s, t = torch.randn(2, 3, 5, 4, 4).unbind()
    labels = torch.randint(5, (3, 4, 4))
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (s, t)]
    for kd in ("mse", "kl"):
        criterion = FAQDLoss(lambda_fa=0, kd=kd)
        torch.testing.assert_close(
            criterion(s, t, labels=labels).loss, criterion(*flat, labels=labels.flatten()).loss
        )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lambda_kd=-1), "lambda_kd must be a finite number >= 0, got -1"),
        (dict(lambda_fa=float("inf")), "lambda_fa must be a finite number >= 0, got inf"),
        (dict(lambda_label=float("nan")), "lambda_label must be a finite number >= 0, got nan"),
        (dict(lambda_kd=0, lambda_fa=0, lambda_label=0), "one of lambda_kd, .* must be > 0, got 0 for all"),
        (dict(kd="l1"), "unknown kd 'l1'; choose one of mse, kl"),
        (dict(temperature=0.0), "temperature must be a number from 0.01 to 100, got 0.0"),
        (dict(temperature=1e6), "temperature must be a number from 0.01 to 100, got 1000000.0"),
        (dict(temperature=float("nan")), "temperature must be a number from 0.01 to 100, got nan"),
    ],
)
def test_bad_options_of_the_loss_are_named(options, message):
    with pytest.raises(ValueError, match=f"FAQDLoss: {message}"):
        FAQDLoss(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lambda_kd="1"), "lambda_kd must be a number, got str"),
        (dict(lambda_fa=torch.ones(())), "lambda_fa must be a number, got Tensor"),
        (dict(lambda_label=True), "lambda_label must be a number, got bool"),
        (dict(temperature=None), "temperature must be a number, got NoneType"),
    ],
)
def test_weights_that_are_no_numbers_are_named(options, message):
    with pytest.raises(TypeError, match=f"FAQDLoss: {message}"):
        FAQDLoss(**options)


def test_a_class_that_the_teacher_rules_out_counts_nothing():
    student, teacher = torch.randn(2, 3, 4).unbind()
    teacher[:, 3] = -math.inf
    criterion = FAQDLoss(lambda_fa=0, lambda_label=0, kd="kl", temperature=1)
    target = teacher.softmax(1)[:, :3]
    expected = (target * (target.log() - student.log_softmax(1)[:, :3])).sum(1).mean()
    torch.testing.assert_close(criterion(student, teacher).loss, expected)


@pytest.mark.parametrize(
    "fa, got", [(FeatureAffinityLoss, "the class FeatureAffinityLoss"), ("l1", "str"), (len, "builtin_funct")]
)
def test_the_loss_of_features_is_a_module(fa, got):
    with pytest.raises(TypeError, match=f"FAQDLoss: fa must be a torch.nn.Module or None, got {got}"):
        FAQDLoss(fa=fa)


def test_the_loss_of_features_is_one_number():
    criterion = FAQDLoss(lambda_kd=0, lambda_label=0, fa=nn.MSELoss(reduction="none"))
    same = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match=r"FAQDLoss: fa must return a 0-dim loss, got shape \[1, 2, 3\]"):
        criterion(torch.ones(1, 2), None, [(same, same)])


def test_pairs_of_features_that_do_not_fit_are_numbered():
    wrong = [*pairs(), (torch.ones(1, 2, 3), torch.ones(1, 2, 4))]
    for names, message in (((), "pair 2 of features"), (("a", "b", "c"), "c")):
        with pytest.raises(ValueError, match=rf"spatial shape of student, \[3\], got \[4\] \({message}\)"):
            FAQDLoss(lambda_kd=0)(torch.ones(1, 2), None, wrong, names=names)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            (torch.ones(2, 3), torch.ones(2, 3), pairs(), None),
            ValueError,
            "labels must be given where .*, got None",
        ),
        ((torch.ones(2, 3), torch.ones(2, 3), [], None), ValueError, "features must hold at least one pair"),
        ((torch.ones(2, 3), torch.ones(2, 1), pairs(), None), ValueError, r"got \[2, 3\] and \[2, 1\]"),
        ((torch.ones(2, 3), None, pairs(), None), TypeError, "teacher_logits must be a tensor, got NoneType"),
        (((torch.ones(2, 3),), None, pairs(), None), TypeError, "student_logits must be a tensor, got tuple"),
        (
            (torch.ones(2, 3), torch.ones(2, 3), pairs()[0], None),
            TypeError,
            "features must be pairs of student's and teacher's, got Tensor",
        ),
        (
            (torch.ones(2, 3, dtype=int), torch.ones(2, 3), pairs(), None),
            TypeError,
            "student_logits must be of a floating dtype, got torch.int64",
        ),
        (
            (torch.ones(3), torch.ones(3), pairs(), None),
            ValueError,
            r"student_logits must have shape \(batch, classes, \*\), got \[3\]",
        ),
    ],
)
def test_what_is_missing_is_named(arguments, error, message):
    with pytest.raises(error, match=f"FAQDLoss: .*{message}"):
        FAQDLoss()(*arguments)


def test_the_loss_prints():
    assert repr(FAQDLoss()).startswith("FAQDLoss(\n  1.0, 10.0, 0.3, kd='mse'\n  (fa): FeatureAffinityLoss(")
    assert "kd='kl', temperature=4.0" in repr(FAQDLoss(kd="kl"))


# ---- the distiller ----


def test_a_distiller_does_what_its_parts_do():
    student, teacher = Net(stride=2), Net(6, seed=1).eval()  # grids of 3 x 3 and 6 x 6
    criterion, connector = FAQDLoss(), Connector(4, relu=True)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    result = distiller(criterion, student, teacher, connectors={"stem": connector})(images(), labels)
    stem, block = student.stem(images()), student.block(student.stem(images()))
    targets = teacher.stem(images()), teacher.block(teacher.stem(images()))
    features = [
        (connector(stem), F.interpolate(targets[0], (3, 3), mode="bilinear", align_corners=True)),
        (block, F.interpolate(targets[1], (1, 1), mode="bilinear", align_corners=True)),
    ]
    want = criterion(student(images()), teacher(images()), features, labels)
    torch.testing.assert_close(result.terms, want)
    assert result.loss is result.terms.loss
    torch.testing.assert_close(result.logits, student(images()))
    result.loss.backward()
    assert all(p.grad is not None for p in [*student.parameters(), *connector.parameters()])
    other = distiller(criterion, student, teacher, connectors={"stem": connector}, align_corners=False)
    assert other(images(), labels).terms.fa != want.fa


def test_one_student_path_may_have_two_teachers():
    taps = [("stem", "stem"), ("stem", "block.conv"), ("block", "block")]
    assert distiller(taps=taps)(images()).terms.fa > distiller(taps=taps[:1])(images()).terms.fa > 0


def in_a_checkpoint(student, reentrant):
    block = student.block
    block.forward = lambda x: checkpoint(type(block).forward, block, x, use_reentrant=reentrant)
    return student


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("why", ["frozen", "checkpoint"])
def test_features_without_a_gradient_are_refused(why):
    student = Net()
    if why == "frozen":
        student.stem.requires_grad_(False)
        path, taps = "stem", TAPS
    else:
        path, taps = "block.bn", {"block.bn": "block", "block.relu": "block"}  # the last one has a gradient
        in_a_checkpoint(student, reentrant=True)
    model = distiller(student=student, taps=taps, connectors={path: Connector(4)})
    message = f"must have a gradient where lambda_fa > 0, got none at '{path}': .* frozen, .* use_reentrant"
    with pytest.raises(RuntimeError, match=message):
        model(images())
    with torch.no_grad():
        assert model(images()).loss > 0
    model.loss.lambda_fa = 0
    model(images()).loss.backward()
    model.loss.lambda_fa = 1
    student.requires_grad_(False)
    assert model.requires_grad_(False)(images()).loss > 0  # nothing is to be learned


def test_features_in_a_checkpoint_that_is_not_reentrant_have_their_gradient():
    want, model = distiller(), distiller(student=in_a_checkpoint(Net(), reentrant=False))
    for each in (want, model):
        each(images()).loss.backward()
    torch.testing.assert_close(model.student.stem.weight.grad, want.student.stem.weight.grad)


def test_a_teacher_is_left_as_it_was():
    teacher = Net(6, seed=1).eval()
    before = copy.deepcopy(teacher.state_dict())
    model = distiller(teacher=teacher).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        result = model(images())
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert_same(teacher.state_dict(), before)
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert model.student.block.bn.num_batches_tracked == 20


@pytest.mark.parametrize("part", ["whole", "one module"])
def test_a_teacher_in_training_mode_is_told_once_and_changes_nothing(part):
    teacher = Net(6, seed=1).eval()
    want = distiller(teacher=teacher)(images()).loss
    before = copy.deepcopy(teacher.state_dict())
    model = distiller(teacher=teacher)
    with pytest.warns(UserWarning, match="Distiller: the teacher was in training mode") as caught:
        for _ in range(3):
            (teacher if part == "whole" else teacher.block.bn).train()
            torch.testing.assert_close(model(images()).loss, want)
            assert not any(module.training for module in teacher.modules())
    assert len(caught) == 1 and caught[0].filename == __file__
    assert_same(teacher.state_dict(), before)


@pytest.mark.filterwarnings("error")
def test_a_teacher_that_is_not_needed_does_not_run():
    model = distiller(FAQDLoss(lambda_kd=0, lambda_fa=0), teacher=Net().train(), taps={})
    model.teacher.forward = None
    labels = torch.zeros(6, dtype=torch.long)
    torch.testing.assert_close(
        model(images(), labels).loss, 0.3 * F.cross_entropy(model.student(images()), labels)
    )


def test_features_of_weight_0_are_not_taken():
    model = distiller(FAQDLoss(lambda_fa=0, lambda_label=0), student=Net(), taps={"stem": "stem"})
    model.remove()
    assert model(images()).terms.fa is None
    model = distiller()
    model.remove()
    assert hooks_in(model.student) == hooks_in(model.teacher) == 0
    with pytest.raises(RuntimeError, match="the hooks are removed"):
        model(images())


def test_the_hooks_go_with_the_distiller():
    student, teacher = Net(), Net(6, seed=1).eval()
    with distiller(student=student, teacher=teacher) as model:
        assert hooks_in(student) == hooks_in(teacher) == 2
        model(images()).loss.backward()
    assert hooks_in(student) == hooks_in(teacher) == 0
    model = distiller(student=student, teacher=teacher)
    assert hooks_in(student) == hooks_in(teacher) == 2
    del model
    gc.collect()
    assert hooks_in(student) == hooks_in(teacher) == 0


def test_the_state_is_that_of_what_is_trained():
    model = distiller(
        FAQDLoss(lambda_label=0, fa=FastFeatureAffinityLoss()), connectors={"block.relu": Connector(4)}
    )
    names = {name.partition(".")[0] for name in model.state_dict()}
    assert names == {"student", "connectors", "loss"} and "loss.fa._extra_state" in model.state_dict()
    trained = [*model.student.parameters(), *model.connectors.parameters()]
    assert [id(p) for p in model.parameters()] == [id(p) for p in trained]
    model.train()
    assert model.student.training and not model.teacher.training
    model.double()
    assert model.teacher.stem.weight.dtype == torch.float64
    assert model(images().double()).loss.dtype == torch.float64


def steps(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        model(images(step)).loss.backward()
        optimizer.step()


def new_run():
    student = torchqat.prepare(Net(), act_bits=2)
    fa = FastFeatureAffinityLoss(3)
    torch.manual_seed(2)
    model = distiller(
        FAQDLoss(lambda_label=0, fa=fa), student, connectors={"block.relu": LazyConnector(relu=True)}
    )
    model.build(images())
    groups = torchqat.optim.param_groups(student, weight_bits=1)
    groups.append({"name": "connectors", "params": list(model.connectors.parameters())})
    return model, torchqat.optim.BCGD(groups, lr=0.01, momentum=0.9)


def test_training_goes_on_bit_for_bit_from_a_checkpoint():
    model, optimizer = new_run()
    start = model.connectors["block/relu"].weight.clone()
    steps(model, optimizer, 0, 2)
    assert model.connectors["block/relu"].weight.unique().numel() == 16  # float,
    assert not torch.equal(model.connectors["block/relu"].weight, start)  # and trained
    assert model.student.stem.weight.unique().numel() == 2
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    steps(model, optimizer, 2, 5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_optimizer = new_run()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    steps(other, other_optimizer, 2, 5)
    assert_same(other.state_dict(), model.state_dict())
    assert_same(other_optimizer.state_dict(), optimizer.state_dict())


@COPIES
def test_distillers_copy(way):
    model = distiller(
        FAQDLoss(lambda_label=0, fa=FastFeatureAffinityLoss()), connectors={"stem": LazyConnector()}
    )
    model.build(images())
    twin = way(model)
    want, got = model(images()), twin(images())
    assert_same(list(got.terms), list(want.terms))
    got.loss.backward()
    assert twin.student.stem.weight.grad is not None and model.student.stem.weight.grad is None
    assert twin.teacher is not model.teacher and twin.student_taps.model is twin.student
    twin.remove()
    assert hooks_in(twin.student) == 0 and hooks_in(model.student) == 2


def test_building_changes_no_mode_and_no_statistics():
    model = distiller(connectors={"stem": LazyConnector(3)})
    model.student.stem.eval()
    before = copy.deepcopy(model.student.state_dict())
    assert model.build(images()) is model
    assert model.student.block.bn.training and not model.student.stem.training
    assert_same(model.student.state_dict(), before)
    assert type(model.connectors["stem"]) is Connector and model.connectors["stem"].weight.shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distillation_under_autocast(dtype, device):
    model = distiller(FAQDLoss(), connectors={"stem": Connector(4)}).to(device)
    labels = torch.zeros(6, dtype=torch.long, device=device)
    want = model(images().to(device), labels)
    with torch.autocast(device.type, dtype):
        got = model(images().to(device), labels)
    assert got.logits.dtype == dtype and got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, want.loss, rtol=0.05, atol=0)
    got.loss.backward()
    assert model.student.stem.weight.grad.isfinite().all()


def test_distillation_in_channels_last():
    model, other = (distiller(connectors={"stem": nn.Identity()}) for _ in range(2))
    want = model(images())
    other.to(memory_format=torch.channels_last)
    got = other(images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(taps={}), ValueError, "taps must name features where lambda_fa > 0, got none"),
        (dict(taps={"stm": "stem"}), ValueError, r"Net has no module 'stm'; .* 'stem' \(the student\)"),
        (dict(taps={"stem": "stm"}), ValueError, r"Net has no module 'stm'; .* 'stem' \(the teacher\)"),
        (dict(taps=["stem"]), TypeError, r"taps must be .*, as {'stem': 'stem'}, got 'stem'"),
        (dict(taps="stem"), TypeError, r"taps must be .*, as {'stem': 'stem'}, got 'stem'"),
        (dict(taps=[("stem", 3)]), TypeError, r"pairs of module paths, .* teacher's, got \('stem', 3\)"),
        (dict(taps=[3]), TypeError, "pairs of module paths, .*, got 3"),
        (dict(taps=3), TypeError, "a mapping or pairs of module paths, .*, got int"),
        (dict(loss=FeatureAffinityLoss()), TypeError, "loss must be a FAQDLoss, got FeatureAffinityLoss"),
        (dict(loss=FAQDLoss), TypeError, "loss must be a FAQDLoss, got the class FAQDLoss"),
        (dict(connectors=[Connector(4)]), TypeError, "connectors must be a mapping of .*, got list"),
        (
            dict(connectors={"stem": Connector}),
            TypeError,
            "connector of 'stem' must be .*, got the class Connector",
        ),
        (dict(connectors={"head": Connector(4)}), ValueError, r"tapped paths \['stem', .*\], got \['head'\]"),
        (dict(teacher=len), TypeError, "teacher must be a torch.nn.Module, got builtin_function_or_method"),
    ],
)
def test_a_distiller_that_cannot_be_made_says_why(wrong, error, message):
    student = Net()
    with pytest.raises(error, match=message):
        distiller(student=student, **wrong)
    assert hooks_in(student) == 0


def test_a_student_that_shares_with_its_teacher_is_refused():
    network, other = Net(), Net()
    for student, got in ((network, "the same network"), (torchqat.prepare(network), "the same network")):
        with pytest.raises(ValueError, match=rf"share modules, got {got}: .* copy.deepcopy\(teacher\)"):
            distiller(student=student, teacher=network)
    with pytest.raises(ValueError, match="share modules, got the student's '_orig_mod' in both"):
        distiller(student=torch.compile(network), teacher=network)
    other.block.bn = network.block.bn
    with pytest.raises(ValueError, match="share modules, got the student's 'block.bn' in both"):
        distiller(student=network, teacher=other)
    other = Net()
    other.head.weight = network.head.weight
    with pytest.raises(ValueError, match="share parameters, got the student's 'head.weight' in both"):
        distiller(student=network, teacher=other)
    distiller(student=network, teacher=copy.deepcopy(network).eval())


def test_a_student_may_be_prepared_in_its_distiller():
    model = distiller()
    torchqat.prepare(model.student, act_bits=2)
    assert isinstance(model.student.block.relu, torchqat.nn.StaircaseReLU)
    torchqat.calibrate(model.student, [images()])
    model(images()).loss.backward()
    assert model.student.block.relu.alpha.grad is not None


@pytest.mark.parametrize("connector, layers", [(Connector(4), 3), (nn.Conv2d(4, 4, 1), 4)])
def test_groups_of_a_distiller_quantize_connectors_that_are_convolutions(connector, layers):
    model = distiller(connectors={"stem": connector})
    groups = {group["name"]: group["params"] for group in torchqat.optim.param_groups(model, weight_bits=1)}
    assert len(groups["quantized"]) == layers
    groups = torchqat.optim.param_groups(model, weight_bits=1, quantize_last=False)
    head = any(p is model.student.head.weight for p in groups[0]["params"])
    assert head == (layers == 4)


def test_connectors_go_by_path():
    class Named(Net):  # as a name that nn.ModuleDict has for itself
        def __init__(self):
            super().__init__()
            self.keys = nn.Identity()

        def forward(self, x):
            return self.keys(super().forward(x))[:, :, None]

    taps = {"block.relu": "block", "keys": "stem", "": "stem"}
    connectors = {path: nn.Conv1d(1, 1, 1) for path in reversed(taps)}
    model = distiller(student=Named(), taps=taps, connectors=connectors)
    assert list(model.connectors) == ["block/relu", "/keys", "/"]
    assert list(model.connectors.values()) == [connectors[path] for path in taps]
    connectors = {path: Connector(4) for path in TAPS}
    one = distiller(connectors=connectors)
    other = distiller(connectors={path: Connector(4) for path in reversed(TAPS)})
    other.load_state_dict(one.state_dict())
    assert_same(list(other(images()).terms), list(one(images()).terms))
    names = [name for name, _ in other.named_parameters()]
    assert names == [name for name, _ in one.named_parameters()]


def test_another_teacher_or_student_is_tapped_and_no_submodule():
    model, before, other = distiller(), Net(), Net(7, seed=2).eval()
    names, old = list(model.state_dict()), (model.teacher, model.student)
    want = distiller(student=before, teacher=other)(images()).loss
    model.teacher, model.student = other, before
    torch.testing.assert_close(model(images()).loss, want)
    assert list(model.state_dict()) == names and model.teacher is other
    assert [hooks_in(network) for network in old] == [0, 0]
    for name, value, error, message in (
        ("teacher", None, TypeError, "teacher must be a torch.nn.Module, got NoneType"),
        ("teacher", before, ValueError, "must not share modules"),
        ("student", nn.ReLU(), ValueError, "ReLU has no module 'stem'"),
    ):
        with pytest.raises(error, match=message):
            setattr(model, name, value)
    torch.testing.assert_close(model(images()).loss, want)


def test_teachers_of_other_classes_are_refused_by_shape():
    teacher = Net().eval()
    teacher.head = nn.Linear(4, 7).eval()
    with pytest.raises(ValueError, match=r"logits of one shape, got \[6, 5\] and \[6, 7\]"):
        distiller(teacher=teacher)(images())


class Refuses(nn.Module):
    def forward(self, *_features):
        raise torch.OutOfMemoryError("not here")


def with_head(teacher, head):
    teacher.head = head
    return teacher.eval()


@pytest.mark.parametrize("way", ["call", "build"])
@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            dict(taps={"stem": "stem", "head": "head"}),
            ValueError,
            r"student must have shape .*, got \[6, 5\] \(the student's 'head', the teacher's 'head'\)",
        ),
        (
            dict(taps={"stem": "head"}),
            ValueError,
            r"resize_like: .*, got .* \(the student's 'stem', the teacher's 'head'\)",
        ),
        (
            dict(connectors={"stem": Connector(7)}),
            ValueError,
            r"Connector: .*, got \[6, 4, 6, 6\] \(the connector of the student's 'stem'\)",
        ),
        (dict(loss=FAQDLoss(lambda_label=0, fa=Refuses())), torch.OutOfMemoryError, "^not here$"),
        (
            dict(teacher=with_head(Net(), nn.Linear(4, 7))),
            ValueError,
            r"one shape, got \[6, 5\] and \[6, 7\]",
        ),
        (
            dict(teacher=with_head(Net(), nn.LSTM(4, 5))),
            TypeError,
            "teacher_logits must be a tensor, got tuple",
        ),
        (
            dict(student=with_head(Net(), nn.LSTM(4, 5))),
            TypeError,
            "student_logits must be a tensor, got tuple",
        ),
    ],
)
def test_what_does_not_fit_is_named_when_called_and_when_built(options, error, message, way):
    model = distiller(**options)
    with pytest.raises(error, match=message):
        (model if way == "call" else model.build)(images())


def test_building_runs_the_loss_and_draws_nothing():
    model, other = (
        distiller(FAQDLoss(fa=FastFeatureAffinityLoss()), connectors={"stem": LazyConnector()})
        for _ in range(2)
    )
    torch.manual_seed(3)
    model.build(images())
    torch.manual_seed(3)
    model.loss.fa.register_forward_hook(lambda *_: seen.append(0))
    seen, labels = [], torch.zeros(6, dtype=torch.long)
    assert_same(list(model.build(images())(images(), labels).terms), list(other(images(), labels).terms))
    assert len(seen) == 2 * len(TAPS)


def test_it_is_part_of_the_package_and_prints():
    assert torchqat.distill.Distiller is Distiller
    assert "'stem': 'stem', 'block.relu': 'block'" in repr(distiller())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(FAQDLoss(), teacher=Net(6).eval())
