"""Where each architecture of encoders keeps its modules, by Transformers' names of classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from elastiformer.tasks import Task


class Reads(StrEnum):
    """What is read of that which the last layer leaves."""

    CLASS = "class"  # the tokens in front that stand for the whole
    TOKENS = "tokens"  # every token, each by itself
    ALL = "all"  # all tokens together


class Pooling(StrEnum):
    """How the features of an item's tokens become one."""

    MEAN = "mean"
    CLASS = "class"
    OWN = "own"  # as the base itself does it


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """Paths of one architecture's modules; those of a layer start at the layer."""

    layers: str
    attention: str = "attention"
    attention_norm: str | None = None
    after_attention: str | None = None
    attention_close: str | None = None
    queries: tuple[str, ...] = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    out: str = "attention.o_proj"
    mlp: str = "mlp"
    mlp_norm: str | None = None
    after_mlp: str | None = None
    mlp_close: str | None = None
    front: str = "mlp.fc1"
    gated: bool = False  # gate and up are fused in `front`
    down: str = "mlp.fc2"
    activation: str = "mlp.activation_fn"
    final_norm: str | None = None
    rotary: str | None = None
    reads_images: bool = False
    takes_types: bool = False  # token types, which tell the two texts of a pair apart
    class_tokens: int = 1  # in front, that stand for the whole
    pooling: Pooling = Pooling.MEAN  # of features, where a folder's files say nothing
    opening: str | None = None  # a norm before the layers
    pooler: str = "pooler"
    hides_patches: bool = False  # a masked autoencoder: by noise, all but a share of them
    # Whether positions of images of another size are interpolated without being asked for.
    interpolates: bool = False


_BERT = EncoderFamily(
    layers="encoder.layer",
    attention="attention.self",
    attention_close="attention.output.LayerNorm",
    queries=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    mlp="intermediate",
    mlp_close="output.LayerNorm",
    front="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    takes_types=True,
)
_VIT = EncoderFamily(
    layers="layers",
    attention_norm="layernorm_before",
    mlp_norm="layernorm_after",
    final_norm="layernorm",
    reads_images=True,
    pooling=Pooling.CLASS,
)
# CLIP's and SigLIP's towers.
_TOWER = EncoderFamily(
    layers="encoder.layers",
    attention="self_attn",
    attention_norm="layer_norm1",
    queries=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    mlp_norm="layer_norm2",
    reads_images=True,
    pooling=Pooling.OWN,
)

# By the model under the head.
ENCODERS: dict[str, EncoderFamily] = {
    "BertModel": _BERT,
    "RobertaModel": _BERT,
    "XLMRobertaModel": _BERT,
    "DistilBertModel": EncoderFamily(
        layers="transformer.layer",
        attention_close="sa_layer_norm",
        queries=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        mlp="ffn",
        mlp_close="output_layer_norm",
        front="ffn.lin1",
        down="ffn.lin2",
        activation="ffn.activation",
    ),
    "ModernBertModel": EncoderFamily(
        layers="layers",
        attention="attn",
        attention_norm="attn_norm",
        queries=("attn.Wqkv",),
        out="attn.Wo",
        mlp_norm="mlp_norm",
        front="mlp.Wi",
        gated=True,
        down="mlp.Wo",
        activation="mlp.act",
        final_norm="final_norm",
        rotary="rotary_emb",
    ),
    "ViTModel": _VIT,
    "DeiTModel": replace(_VIT, class_tokens=2),
    # A masked autoencoder's decoder reads every token, and its class token learns little.
    "ViTMAEModel": replace(_VIT, pooling=Pooling.MEAN, hides_patches=True),
    "CLIPVisionModel": replace(_TOWER, opening="pre_layrnorm", pooler="post_layernorm"),
    "SiglipVisionModel": replace(
        _TOWER, final_norm="post_layernorm", pooler="head", class_tokens=0
    ),
    "Dinov2Model": EncoderFamily(
        layers="encoder.layer",
        attention_norm="norm1",
        after_attention="layer_scale1",
        mlp_norm="norm2",
        after_mlp="layer_scale2",
        final_norm="layernorm",
        reads_images=True,
        pooling=Pooling.CLASS,
        interpolates=True,
    ),
}

# By the whole model; one without a head gives features.
HEADS: dict[str, tuple[Task, Reads]] = {
    **{
        f"{name}ForSequenceClassification": (Task.TEXT_CLASSIFICATION, Reads.CLASS)
        for name in ("Bert", "Roberta", "XLMRoberta", "DistilBert", "ModernBert")
    },
    **{
        f"{name}ForTokenClassification": (Task.TOKEN_CLASSIFICATION, Reads.TOKENS)
        for name in ("Bert", "Roberta", "XLMRoberta", "DistilBert", "ModernBert")
    },
    "ViTForImageClassification": (Task.IMAGE_CLASSIFICATION, Reads.CLASS),
    "DeiTForImageClassification": (Task.IMAGE_CLASSIFICATION, Reads.CLASS),
    "DeiTForImageClassificationWithTeacher": (Task.IMAGE_CLASSIFICATION, Reads.CLASS),
    "Dinov2ForImageClassification": (Task.IMAGE_CLASSIFICATION, Reads.ALL),
    "CLIPForImageClassification": (Task.IMAGE_CLASSIFICATION, Reads.ALL),
    "SiglipForImageClassification": (Task.IMAGE_CLASSIFICATION, Reads.ALL),
    "CLIPVisionModelWithProjection": (Task.FEATURES, Reads.CLASS),
}

# What a folder may hold, and the model in it that gives features, where AutoModel loads another.
FEATURES_OF = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "CLIPVisionModelWithProjection": "CLIPVisionModelWithProjection",
    "CLIPForImageClassification": "CLIPVisionModel",
    "SiglipModel": "SiglipVisionModel",
    "SiglipForImageClassification": "SiglipVisionModel",
    "ViTMAEForPreTraining": "ViTMAEModel",
}
