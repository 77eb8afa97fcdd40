"""Heat maps: which dimension is averaged, and when that is unclear."""

import pytest
import torch
from torch import nn

import parchgrad as pg
from parchgrad.errors import InputError, SettingError
from parchgrad.explain.heatmap import channel_dim_of
from parchgrad.explain.stability import cosine, noisy_copies
from tests.messages import check_message

both = pytest.mark.parametrize("draw", [pg.heatmap, pg.signed_heatmap])


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@both
def test_channel_dim_equals_the_permuted_call(draw):
    clip = random(2, 5, 3, 4, 6)
    wanted = torch.stack([draw(clip[:, frame]) for frame in range(5)], dim=1)
    torch.testing.assert_close(draw(clip, channel_dim=2), wanted, rtol=0, atol=0)
    torch.testing.assert_close(draw(clip.transpose(1, 2)), wanted, rtol=0, atol=0)
    last = random(2, 4, 6, 7)
    for channel_dim in (3, -1):
        assert torch.equal(draw(last, channel_dim=channel_dim), draw(last.permute(0, 3, 1, 2)))


def test_channels_are_averaged_by_hand():
    clip = torch.tensor([[[[[1.0]], [[-3.0]], [[5.0]]], [[[0.0]], [[6.0]], [[0.0]]]]])
    assert clip.shape == (1, 2, 3, 1, 1)
    assert pg.heatmap(clip, channel_dim=2).flatten().tolist() == [3, 2]
    assert pg.signed_heatmap(clip, channel_dim=2).flatten().tolist() == [1, 2]
    assert pg.heatmap(clip, channel_dim=1).flatten().tolist() == [0.5, 4.5, 2.5]


@both
@pytest.mark.parametrize("channels", [1, 3])
def test_frames_are_not_averaged_in_silence(draw, channels):
    clip = random(1, 16, channels, 4, 4)
    with pytest.raises(InputError) as raised:
        draw(clip)
    check_message(raised.value, f"(1, 16, {channels}, 4, 4)", "`channel_dim=2`", "`channel_dim=1`", f"{channels} chan")
    assert draw(clip, channel_dim=1).shape == (1, channels, 4, 4)


@both
@pytest.mark.parametrize(
    "shape", [(1, 3, 16, 4, 4), (1, 1, 3, 4, 4), (1, 3, 3, 4, 4), (1, 2, 5, 4, 4), (1, 16, 3, 4), (1, 12, 3), (2, 6, 9)]
)
def test_other_shapes_average_dimension_1(draw, shape):
    values = random(*shape)
    assert channel_dim_of(values) == 1
    assert torch.equal(draw(values), draw(values, channel_dim=1))
    assert draw(values).shape == (shape[0], *shape[2:])


@both
@pytest.mark.parametrize("channel_dim", [0, -4, 4, -5, True, 1.0, "1"])
def test_dimensions_that_have_no_channels(draw, channel_dim):
    with pytest.raises(SettingError) as raised:
        draw(random(2, 3, 4, 5), channel_dim=channel_dim)
    check_message(raised.value, f"`channel_dim` is {channel_dim!r}", "(2, 3, 4, 5)", "from 1 to 3")


class Clips(nn.Module):
    """Takes clips (B, T, C, H, W), as the video models of Hugging Face do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv3d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(48, 4)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, clips):
        return self.layers(clips.transpose(1, 2))


def test_stability_of_a_clip_is_that_of_its_frames():
    explainer, clips = pg.Explainer(Clips().eval()), random(2, 5, 3, 6, 6)
    copies = noisy_copies(clips, noise=0.2, draws=3, seed=4)
    clean = pg.heatmap(explainer.attribute(clips, 1), channel_dim=2)
    noisy = [pg.heatmap(explainer.attribute(copy, 1), channel_dim=2) for copy in copies]
    wanted = torch.stack([cosine(clean, each) for each in noisy]).mean(dim=0)
    found = explainer.stability(clips, 1, noise=0.2, draws=3, seed=4)
    torch.testing.assert_close(found, wanted)
    assert (found < 0.9999).all()


def conv2d_network(channels):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 4)).double().eval()


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "integrated_gradients", "smoothgrad"])
@pytest.mark.parametrize("shape", [(13, 12, 12), (1, 8, 20)])
def test_bands_and_spectrograms_are_explained_as_other_images(shape, method):
    explainer, inputs = pg.Explainer(conv2d_network(shape[0]), method=method), random(2, *shape)
    attribution = explainer.attribute(inputs, 2)
    wanted = sum(attribution[:, channel].abs() for channel in range(shape[0])) / shape[0]
    torch.testing.assert_close(pg.heatmap(attribution), wanted)
    assert (wanted > 0).any()
