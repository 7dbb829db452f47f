"""The comparison with another pack: its nodes patch the same model, and a row of each is in the table."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
from comfyui_likeness.benchmarks import peer
from comfyui_likeness.benchmarks.models import build_unet_model

# A pack of the IPAdapter family with its nodes' names and arguments; its "adapter" halves the cross-attention.
PEER_NODES = """
class IPAdapterFaceID:
    def apply_ipadapter(self, model, ipadapter, weight=1.0, image=None, insightface=None, clip_vision=None, **options):
        assert insightface.get(image)[0].kps.shape == (5, 2) and clip_vision.model is not None
        return patch(model, ipadapter), image

class IPAdapterEmbeds:
    def apply_ipadapter(self, model, ipadapter, pos_embed, weight, weight_type, start_at, end_at, neg_embed=None):
        assert pos_embed.shape == neg_embed.shape
        return (patch(model, ipadapter),)

def patch(model, ipadapter):
    assert "1.to_k_ip.weight" in ipadapter["ip_adapter"] and ipadapter["image_proj"]
    model = model.clone()
    model.set_model_attn2_output_patch(lambda x, options: x / 2)
    return model

NODE_CLASS_MAPPINGS = {node.__name__: node for node in (IPAdapterFaceID, IPAdapterEmbeds)}
"""


@pytest.fixture
def peer_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "__init__.py").write_text(PEER_NODES, encoding="utf-8")
    monkeypatch.delitem(sys.modules, peer.PEER_PACKAGE, raising=False)
    yield tmp_path
    sys.modules.pop(peer.PEER_PACKAGE, None)


@pytest.mark.parametrize("kind", peer.PEER_KINDS)
def test_the_peers_nodes_get_the_same_weights(peer_folder: Path, kind: str) -> None:
    model = build_unet_model("sd15", "small")
    patched = peer.apply_peer_adapter(peer_folder, model, "sd15", "small", kind)
    assert patched is not model and len(patched.model_options["transformer_options"]["patches"]["attn2_output_patch"])
    assert "patches" not in model.model_options["transformer_options"]


def test_cases_share_one_model(peer_folder: Path) -> None:
    arguments = Namespace(peer=peer_folder, size="small", resolution=64)
    cases = peer.make_benchmarks(arguments, "sd15")
    assert [*cases] == [
        ("model only", ""), *((kind, pack) for kind in peer.PEER_KINDS for pack in (peer.THIS_PACK, peer.PEER)),
    ]  # fmt: skip
    assert len({id(case.model.model) for case in cases.values()}) == 1


def test_the_table_compares_with_the_peer() -> None:
    rows = [
        peer.PeerRow("model only", "", 1.0, 2**20, None),
        peer.PeerRow("plus", peer.THIS_PACK, 1.2, 2**21, 0.0),
        peer.PeerRow("plus", peer.PEER, 1.6, 2**21, 3.0),
    ]
    lines = peer.format_peer_table(rows).splitlines()[2:]
    assert lines[0] == "| model only |  | 1.000 | 1.00 | - | 1 | - |"
    assert lines[1] == "| plus | this pack | 1.200 | 1.20 | 0.75 | 2 | 0 |"
    assert lines[2] == "| plus | peer | 1.600 | 1.60 | 1.00 | 2 | 3 |"


def test_a_folder_without_a_pack_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the folder of a node pack"):
        peer.import_peer(tmp_path / "missing")
