"""Threads, tasks, copied contexts, nested blocks and generators: each sees its own blocks, and none leaves a trace."""

import asyncio
import contextvars
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import captum.attr
import pytest
import torch
from torch import nn
from torch.nn import functional

import parchgrad as pg
from parchgrad.core import engine, passes, rules, session
from parchgrad.errors import InputError, ModelWarning, ParchGradError, TargetError
from tests.support import hooks, random_statistics

THREADS, ROUNDS = 8, 200


class Residual(nn.Module):
    """Batch norm, operations in place, a skip path and a convolution that serves twice."""

    def __init__(self, channels=6, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.second = nn.Conv2d(channels, channels, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        for _ in range(2):
            out = self.second(self.relu(self.first(x)))
            out += x
            x = functional.relu_(out)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(3)
    found = Residual().double().eval()
    nn.init.uniform_(found.norm.running_mean)
    nn.init.uniform_(found.norm.running_var, 0.5, 2)
    return found


@pytest.fixture
def hasty():
    """Threads take turns after microseconds, so that they meet in the middle of whatever is not safe."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def gradient(model, inputs, target=1):
    leaf = inputs.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]


def inside(model, selector, inputs, target=1, **settings):
    with pg.ParchGrad(model, selector, **{"layers": "all"} | settings):
        return gradient(model, inputs, target)


def selectors():
    statistics = random_statistics({"stem": 6, "first": 6, "second": 6})
    return [
        pg.ClassWise(statistics, quantile=0.4),
        pg.InstanceWise(statistics, quantile=0.4),
        pg.GradientEnergy(quantile=0.2),
        pg.GradientTimesActivation(quantile=0.5),
        pg.Evidence(quantile=0.4),
        pg.RandomChannels(quantile=0.5),
        pg.Evidence(softness=0),
    ]


def clean():
    """Nothing is open in the context of this thread or task, and no rules act."""
    is_idle = not rules.has_active_rules() and torch.overrides._get_current_function_mode_stack() == []
    return is_idle and session.SESSIONS.get() == () == passes.FORWARDS.get()


class RefusedError(Exception):
    pass


def refuse(_):
    raise RefusedError


def jobs_of(model, number):
    """What one thread does: functions that make a map, each of its own target, layers and inputs."""
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    target = number % 5
    targets = torch.tensor([target, (target + 1 + number // 5) % 5])
    layers = [["stem", "second"], ["first"], "all", 0.5][number % 4]
    every = selectors()
    first, second, third = (every[(number + step) % len(every)] for step in (0, 2, 4))

    def by_captum(attribution, selector, **options):
        with pg.ParchGrad(model, selector, layers=layers):
            return attribution(model).attribute(inputs.clone().requires_grad_(), target=targets, **options)

    smooth = pg.Explainer(model, second, layers=layers, method="smoothgrad", samples=3, seed=number)
    explainer = pg.Explainer(model, first, layers=layers, gamma=2.0 if number % 2 else torch.inf)
    plain = pg.Explainer(model, None, method=("gradient", "input_x_gradient")[number % 2])
    return [
        lambda: gradient(model, inputs, target),
        lambda: inside(model, first, inputs, target, layers=layers, conserve="exact"),
        lambda: inside(model, third, inputs, layers="all", target=target),
        lambda: explainer.attribute(inputs, targets),
        lambda: plain.attribute(inputs, targets),
        lambda: smooth.attribute(inputs, targets),
        lambda: by_captum(captum.attr.Saliency, second, abs=False),
        lambda: by_captum(captum.attr.IntegratedGradients, third, n_steps=3, internal_batch_size=4),
    ]


def failures_of(model, number):
    """Passes that fail inside a block, each with the error that it ends in, and a word of it."""
    inputs = torch.ones(2, 3, 8, 8, dtype=torch.float64)
    selector = selectors()[number % 7]
    explainer = pg.Explainer(model, selector, layers="all")

    def backward():
        with pg.ParchGrad(model, selector, layers="all"):
            leaf = inputs.clone().requires_grad_()
            output = model(leaf)
            leaf.register_hook(refuse)
            output[:, number % 5].sum().backward(inputs=[leaf])

    def forward():
        with pg.ParchGrad(model, selector, layers="all"):
            model(inputs[:, :2].clone().requires_grad_())

    return [
        (TargetError, "9", lambda: explainer.attribute(inputs, 9)),
        (InputError, "2 channels", lambda: explainer.attribute(inputs[:, :2], 1)),
        (RefusedError, "", backward),
        (RuntimeError, "to have 3 channels", forward),
    ]


@pytest.mark.usefixtures("hasty")
def test_threads_on_one_shared_model_get_the_maps_that_they_get_alone(model):
    """Equal bit for bit: maps this small are summed by one thread, in one order."""
    work = [(jobs_of(model, number), failures_of(model, number)) for number in range(THREADS)]
    wanted = [[job() for job in jobs] for jobs, _ in work]
    # Otherwise it would not be noticed if one thread had another's map.
    every = torch.stack([found for own in wanted for found in own]).flatten(1)
    assert (torch.cdist(every, every).fill_diagonal_(1) > 1e-9).all()
    before, problems, barrier = set(threading.enumerate()), [], threading.Barrier(THREADS)

    def use(number):
        draw, (jobs, failures) = random.Random(number), work[number]
        barrier.wait()
        for turn in range(ROUNDS):
            if turn % 7 == 6:
                error, word, fail = draw.choice(failures)
                # A thread that ends here would look like one without problems.
                try:
                    fail()
                    problems.append((number, turn, "did not fail"))
                except Exception as raised:
                    # torch raises its own exception, which nobody explains, where another thread sets hooks meanwhile.
                    is_torchs = "mutated during iteration" in str(raised)
                    if not is_torchs and (not isinstance(raised, error) or word not in str(raised)):
                        problems.append((number, turn, repr(raised)))
            else:
                place = draw.randrange(len(jobs))
                try:
                    if not torch.equal(jobs[place](), wanted[number][place]):
                        problems.append((number, turn, f"another map of job {place}"))
                except Exception as error:
                    problems.append((number, turn, repr(error)))
            if not clean():
                problems.append((number, turn, "something was left open"))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert hooks(model) == 0
    assert set(threading.enumerate()) <= before
    assert clean()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("hasty")
def test_threads_go_back_through_one_pass_each_for_its_own_class(model, inputs):
    selector = pg.ClassWise(random_statistics({"stem": 6, "first": 6, "second": 6}), quantile=0.4)
    leaf = inputs.clone().requires_grad_()
    with pg.ParchGrad(model, selector, layers="all"):
        output = model(leaf)

    def back(target):
        return torch.autograd.grad(output[:, target].sum(), leaf, retain_graph=True)[0]

    wanted = [back(target) for target in range(5)]
    every = torch.stack(wanted).flatten(1)
    assert (torch.cdist(every, every).fill_diagonal_(1) > 1e-9).all()
    targets = list(range(5)) * 60
    with ThreadPoolExecutor(5) as pool:
        for target, found in zip(targets, pool.map(back, targets), strict=True):
            assert torch.equal(found, wanted[target])


def test_threads_may_share_one_block_and_one_explainer(model, inputs):
    block = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.2), layers="all")
    explainer = pg.Explainer(model, pg.ClassWise(random_statistics({"first": 6}), quantile=0.4), layers=["first"])
    wanted = [(gradient_in(block, model, inputs, target), explainer.attribute(inputs, target)) for target in range(5)]

    def use(number):
        return all(
            torch.equal(gradient_in(block, model, inputs, target), wanted[target][0])
            and torch.equal(explainer.attribute(inputs, target), wanted[target][1])
            for target in (number % 5, (number + 1) % 5)
            for _ in range(10)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(4)))
    assert hooks(model) == 0
    assert block._sessions == []


def gradient_in(block, model, inputs, target=1):
    with block:
        return gradient(model, inputs, target)


# What a thread or task inherits


def test_a_thread_of_its_own_has_no_block_and_one_with_a_copied_context_has(model, inputs):
    plain, edited = gradient(model, inputs), inside(model, pg.GradientEnergy(quantile=0.2), inputs)
    assert not torch.allclose(plain, edited)
    with ThreadPoolExecutor(4) as pool:
        with pg.ParchGrad(model, pg.GradientEnergy(quantile=0.2), layers="all"):
            alone = [pool.submit(contextvars.Context().run, gradient, model, inputs) for _ in range(8)]
            carried = [pool.submit(contextvars.copy_context().run, gradient, model, inputs) for _ in range(8)]
            assert all(torch.equal(future.result(), plain) for future in alone)
            assert all(torch.equal(future.result(), edited) for future in carried)
            late = contextvars.copy_context()
            # A block that the worker opens itself is the innermost there, and closed there.
            other = pool.submit(contextvars.copy_context().run, inside, model, pg.RandomChannels(), inputs)
            assert torch.equal(other.result(), inside(model, pg.RandomChannels(), inputs))
            assert torch.equal(gradient(model, inputs), edited)
        # The block has ended, whoever still carries it.
        assert torch.equal(pool.submit(late.run, gradient, model, inputs).result(), plain)
    assert torch.equal(late.run(inside, model, pg.RandomChannels(), inputs), inside(model, pg.RandomChannels(), inputs))
    assert hooks(model) == 0


def test_a_backward_pass_belongs_to_its_forward_pass_whichever_thread_runs_it(model, inputs):
    selector = pg.ClassWise(random_statistics({"stem": 6, "first": 6, "second": 6}), quantile=0.4)
    leaf = inputs.clone().requires_grad_()
    with pg.ParchGrad(model, selector, layers="all"):
        score = model(leaf)[:, 3].sum()
    with ThreadPoolExecutor(1) as pool:
        (found,) = pool.submit(torch.autograd.grad, score, leaf).result()
    assert torch.equal(found, inside(model, selector, inputs, 3))


def test_tasks_that_take_turns_inside_their_blocks_do_not_see_each_other(model, inputs):
    async def explain(selector, target):
        with pg.ParchGrad(model, selector, layers="all"):
            await asyncio.sleep(0)
            leaf = inputs.clone().requires_grad_()
            score = model(leaf)[:, target].sum()
            await asyncio.sleep(0)
            (found,) = torch.autograd.grad(score, leaf)
            await asyncio.sleep(0)
        return found

    async def together():
        work = [(selector, target) for selector in selectors() for target in range(5)]
        found = await asyncio.gather(*(explain(*each) for each in work), gradient_later(model, inputs))
        return work, found

    work, found = asyncio.run(together())
    for (selector, target), each in zip(work, found, strict=False):
        assert torch.equal(each, inside(model, selector, inputs, target))
    assert torch.equal(found[-1], gradient(model, inputs))
    assert hooks(model) == 0
    assert clean()


async def gradient_later(model, inputs):
    await asyncio.sleep(0)
    return gradient(model, inputs)


def test_tasks_and_asyncio_threads_inherit_the_block_they_were_made_in(model, inputs):
    plain, edited = gradient(model, inputs), inside(model, pg.GradientEnergy(quantile=0.2), inputs)

    async def work():
        before = asyncio.create_task(gradient_later(model, inputs))
        with pg.ParchGrad(model, pg.GradientEnergy(quantile=0.2), layers="all"):
            within = asyncio.create_task(gradient_later(model, inputs))
            threaded = asyncio.to_thread(gradient, model, inputs)
            assert torch.equal(await before, plain)
            assert torch.equal(await within, edited)
            assert torch.equal(await threaded, edited)
            outlasting = asyncio.create_task(gradient_later(model, inputs))
        # It runs only now, when the block has ended.
        assert torch.equal(await outlasting, plain)

    asyncio.run(work())
    assert hooks(model) == 0


def test_a_block_left_in_another_task_is_an_error_and_leaves_no_hook(model, inputs):
    block = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.2), layers="all")

    async def enter():
        block.__enter__()

    async def work():
        await asyncio.create_task(enter())
        with pytest.raises(ParchGradError, match="another thread or task"):
            block.__exit__(None, None, None)

    asyncio.run(work())
    assert hooks(model) == 0
    assert torch.equal(gradient_in(block, model, inputs), inside(model, pg.GradientEnergy(quantile=0.2), inputs))


def test_a_cancelled_task_leaves_nothing(model, inputs):
    async def endless():
        with pg.ParchGrad(model, pg.GradientEnergy(), layers="all"):
            await asyncio.sleep(60)

    async def work():
        task = asyncio.create_task(endless())
        await asyncio.sleep(0)
        assert hooks(model) > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return gradient(model, inputs)

    assert torch.equal(asyncio.run(work()), gradient(model, inputs))
    assert hooks(model) == 0


# Nesting


def test_of_blocks_on_a_model_and_its_parts_the_innermost_around_a_convolution_acts(model, inputs):
    wrapper = nn.Sequential(model, nn.Identity()).eval()
    energy, chance = pg.GradientEnergy(quantile=0.2), pg.RandomChannels(quantile=0.5)
    part = nn.Sequential(model.first, model.relu, model.second).eval()
    by_chance = inside(wrapper, chance, inputs)
    with pg.ParchGrad(wrapper, energy, layers="all"):
        alone = gradient(wrapper, inputs)
        with pg.ParchGrad(part, chance, layers="all", gates=0, antialias=False, balance=False):
            mixed = gradient(wrapper, inputs)
        assert torch.equal(gradient(wrapper, inputs), alone)
        with engine.plain_gradients(part):
            rest = gradient(wrapper, inputs)
        with engine.plain_gradients(wrapper):
            assert torch.equal(gradient(wrapper, inputs), gradient_outside(wrapper, inputs))
            # Of a plain block too only the innermost counts.
            assert torch.equal(inside(wrapper, chance, inputs), by_chance)
    assert torch.equal(rest, inside(wrapper, energy, inputs, layers=["0.stem"]))
    # The part's own convolutions by chance, the stem by the block around.
    masks = seen_masks(model, chance, inputs)
    assert not torch.allclose(mixed, alone)
    assert not torch.allclose(mixed, rest)
    fixed = pg.ParchGrad(part, pg.FixedChannels(masks), layers="all", gates=0, antialias=False, balance=False)
    with pg.ParchGrad(model, energy, layers=["stem"]), fixed:
        assert torch.equal(gradient(model, inputs), mixed)
    assert hooks(wrapper) == 0


def gradient_outside(model, inputs):
    return contextvars.Context().run(gradient, model, inputs)


def seen_masks(model, selector, inputs):
    """The channels that a selector keeps in the part, by the names that they have there."""
    seen = {}

    class Watching(type(selector)):
        def select(self, signal):
            found = super().select(signal)
            seen[signal.layer] = found[0]
            return found

    part = nn.Sequential(model.first, model.relu, model.second).eval()
    with pg.ParchGrad(
        part, Watching(quantile=selector.quantile), layers="all", gates=0, antialias=False, balance=False
    ):
        gradient(model, inputs)
    return seen


def test_blocks_may_be_left_in_another_order_than_they_were_entered(model, inputs):
    energy = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.2), layers="all")
    chance = pg.ParchGrad(model, pg.RandomChannels(quantile=0.5), layers="all")
    by_energy, by_chance = gradient_in(energy, model, inputs), gradient_in(chance, model, inputs)
    energy.__enter__()
    chance.__enter__()
    assert torch.equal(gradient(model, inputs), by_chance)
    energy.__exit__(None, None, None)
    assert torch.equal(gradient(model, inputs), by_chance)
    energy.__enter__()
    assert torch.equal(gradient(model, inputs), by_energy)
    energy.__exit__(None, None, None)
    chance.__exit__(None, None, None)
    assert torch.equal(gradient(model, inputs), gradient_outside(model, inputs))
    assert hooks(model) == 0


def test_one_object_entered_in_itself_edits_once(model, inputs):
    block = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.2), layers="all")
    once = gradient_in(block, model, inputs)
    with block:
        with block:
            assert torch.equal(gradient(model, inputs), once)
            with block:
                assert torch.equal(gradient(model, inputs), once)
        # Of each entrance it is known for itself whether the model was called.
        with pytest.warns(ModelWarning, match="Nothing was edited"), block:
            pass
        assert torch.equal(gradient(model, inputs), once)
    assert hooks(model) == 0
    assert clean()


def test_nested_explainers_on_one_model_are_those_they_are_alone(model, inputs):
    outer = pg.Explainer(model, pg.Evidence(quantile=0.4), layers="all")
    alone = outer.attribute(inputs, 2)
    with pg.ParchGrad(model, pg.RandomChannels(), layers="all"):
        chance = gradient(model, inputs)
        assert torch.equal(outer.attribute(inputs, 2), alone)
        assert torch.equal(pg.Explainer(model, None).attribute(inputs, 1), gradient_outside(model, inputs))
        with pytest.raises(TargetError):
            outer.attribute(inputs, 99)
        assert torch.equal(gradient(model, inputs), chance)


# Generators


def maps(model, selector, inputs):
    with pg.ParchGrad(model, selector, layers="all"):
        for target in range(5):
            yield gradient(model, inputs, target)


def test_a_generator_that_waits_inside_a_block_leaves_it_open_for_whoever_drives_it(model, inputs):
    energy = pg.GradientEnergy(quantile=0.2)
    found = maps(model, energy, inputs)
    edited = inside(model, energy, inputs)
    assert torch.equal(next(found), inside(model, energy, inputs, 0))
    # Python gives generators no context of their own.
    assert torch.equal(gradient(model, inputs), edited)
    found.close()
    assert torch.equal(gradient(model, inputs), gradient_outside(model, inputs))
    assert not torch.allclose(gradient(model, inputs), edited)
    # Driven to its end, and in a context of its own, nobody else notices.
    own = contextvars.Context()
    found = maps(model, energy, inputs)
    assert torch.equal(own.run(next, found), inside(model, energy, inputs, 0))
    assert torch.equal(gradient(model, inputs), gradient_outside(model, inputs))
    own.run(list, found)
    assert hooks(model) == 0
    assert clean()


def test_generators_that_take_turns_have_the_block_that_was_entered_last(model, inputs):
    energy, chance = maps(model, pg.GradientEnergy(quantile=0.2), inputs), maps(model, pg.RandomChannels(), inputs)
    by_chance = inside(model, pg.RandomChannels(), inputs)
    next(energy)
    next(chance)
    # Which is why generators that take turns need contexts of their own.
    assert torch.equal(next(energy), by_chance)
    chance.close()
    assert torch.equal(next(energy), inside(model, pg.GradientEnergy(quantile=0.2), inputs, 2))
    energy.close()
    driven = [(contextvars.Context(), each, maps(model, each, inputs)) for each in selectors()]
    for target in range(5):
        for context, selector, found in driven:
            assert torch.equal(context.run(next, found), inside(model, selector, inputs, target))
    for context, _, found in driven:
        context.run(found.close)
    assert hooks(model) == 0


# Python says what a generator raised while it was destroyed, as there is nobody to raise it to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_generator_dropped_in_another_context_leaves_no_hook(model, inputs):
    found = maps(model, pg.GradientEnergy(quantile=0.2), inputs)
    contextvars.Context().run(next, found)
    assert hooks(model) > 0
    del found
    assert hooks(model) == 0
    assert clean()
