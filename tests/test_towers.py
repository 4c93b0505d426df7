import pytest
import torch
from transformers import AutoConfig

from syncmask import SyncMaskConfig, SyncMaskModel
from syncmask.towers import build_tower, kept_patches, num_prefix_tokens, patch_grid, patchify

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def tower_of(family):
    torch.manual_seed(0)
    tower = build_tower(AutoConfig.for_model(family, **SIZES)).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return tower


@pytest.fixture
def photos():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def slow_kept(tower, photo, keep, prefix):
    """Embed one whole photo, pick the tokens one by one, and run the tower layer by layer."""
    embedded = tower.embeddings(photo[None])[0]
    tokens = [embedded[place] for place in range(prefix)]
    tokens += [embedded[prefix + patch] for patch in keep.tolist()]
    states = torch.stack(tokens)[None]
    for layer in tower.layers:
        states = layer(states)
    return tower.layernorm(states)[0]


@pytest.mark.parametrize("family, prefix", [("vit", 1), ("deit", 2)])
def test_kept_patches_equal_gathered_embeddings(family, prefix, photos):
    tower = tower_of(family)
    assert num_prefix_tokens(tower.config) == prefix
    keep = torch.tensor([[0, 3, 7, 15], [1, 2, 8, 9], [12, 4, 0, 5]])  # in any order
    with kept_patches(tower, keep, prefix), torch.no_grad():
        fast = tower(pixel_values=photos).last_hidden_state
    assert fast.shape == (3, prefix + 4, 32)
    for row in range(3):
        torch.testing.assert_close(fast[row], slow_kept(tower, photos[row], keep[row], prefix), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family, prefix", [("vit", 1), ("deit", 2)])
def test_keeping_all_patches_is_the_tower_itself(family, prefix, photos):
    tower = tower_of(family)
    plain = tower(pixel_values=photos).last_hidden_state
    for keep in (None, torch.arange(16).expand(3, -1)):
        with kept_patches(tower, keep, prefix):
            torch.testing.assert_close(tower(pixel_values=photos).last_hidden_state, plain)


def test_a_whole_model_runs_on_a_deit_tower(tiny_config, photos):
    config = SyncMaskConfig(
        mask_token_id=4,
        vision_config={"model_type": "deit", **SIZES},
        text_config=tiny_config.text_config.to_dict(),
        fusion_encoder_config=tiny_config.fusion_encoder_config.to_dict(),
        mim_decoder_config=tiny_config.mim_decoder_config.to_dict(),
    )
    model = SyncMaskModel(config).eval()
    assert model.num_prefix_tokens == 2
    assert model.encode_image(photos).shape == (3, 18, 32)
    assert model.encode_image(photos, keep=torch.zeros(3, 1, dtype=torch.long)).shape == (3, 3, 32)


def test_hidden_patches_have_no_influence(photos):
    tower, keep = tower_of("vit"), torch.tensor([[0, 1, 4, 5]]).expand(3, -1)
    painted = photos.clone()
    painted[:, :, 16:] = 99.0  # patches 8 to 15
    results = []
    for pixels in (photos, painted):
        with kept_patches(tower, keep, 1):
            results.append(tower(pixel_values=pixels).last_hidden_state)
    assert torch.equal(*results)


def test_the_hook_is_gone_after_use_and_after_an_error(photos):
    tower = tower_of("vit")
    with kept_patches(tower, torch.tensor([[0]]), 1):
        assert len(tower.embeddings._forward_hooks) == 1
    assert not tower.embeddings._forward_hooks
    with pytest.raises(RuntimeError), kept_patches(tower, torch.tensor([[99]] * 3), 1):  # no such patch
        tower(pixel_values=photos)
    assert not tower.embeddings._forward_hooks
    assert tower(pixel_values=photos).last_hidden_state.shape == (3, 17, 32)


def test_gradients_reach_the_kept_patches_alone(photos):
    tower = tower_of("vit")
    pixels = photos.clone().requires_grad_()
    with kept_patches(tower, torch.tensor([[5]]).expand(3, -1), 1):
        tower(pixel_values=pixels).last_hidden_state.square().sum().backward()
    touched = patchify(pixels.grad, (4, 4)).abs().sum(dim=-1) > 0
    assert touched.nonzero()[:, 1].tolist() == [5, 5, 5]


def test_towers_have_no_pooling_layer():
    for family in ("vit", "deit", "bert"):
        assert getattr(build_tower(AutoConfig.for_model(family, **SIZES)), "pooler", None) is None


@pytest.mark.parametrize("family", ["siglip_vision_model", "swin", "dinov2_with_registers"])
def test_families_that_are_not_tested_are_refused(family):
    with pytest.raises(ValueError, match=rf"{family}.*deit.*vit"):
        num_prefix_tokens(AutoConfig.for_model(family))


def test_patchify_cuts_row_by_row_and_loses_nothing(photos):
    patches = patchify(photos, (4, 4))
    assert patches.shape == (3, 16, 192)
    for row in range(4):
        for column in range(4):
            window = photos[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal(patches[:, 4 * row + column], window.flatten(1))


def test_patchify_agrees_with_the_towers_order(photos):
    """Patch n of `patchify` is what the tower's n-th patch token is made of."""
    embed = tower_of("vit").embeddings.patch_embeddings
    weight, bias = embed.projection.weight, embed.projection.bias
    torch.testing.assert_close(
        embed(photos), patchify(photos, (4, 4)) @ weight.flatten(1).T + bias, atol=1e-4, rtol=1e-4
    )


def test_photos_and_patches_need_not_be_square():
    config = AutoConfig.for_model("vit", image_size=[32, 16], patch_size=[8, 4])
    assert patch_grid(config) == (4, 4)
    pixels = torch.arange(32 * 16.0).view(1, 1, 32, 16)
    assert torch.equal(patchify(pixels, (4, 4))[0, 5], pixels[0, 0, 8:16, 4:8].flatten())


def test_a_patch_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="patch_size=7 does not divide image_size=32"):
        patch_grid(AutoConfig.for_model("vit", image_size=32, patch_size=7))
