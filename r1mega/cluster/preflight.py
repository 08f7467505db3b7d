"""What can be known to fail before any process starts: machines, packages, data and weights."""

from importlib.util import find_spec
from pathlib import Path

from r1mega.cluster.engine_layout import engine_layout
from r1mega.cluster.errors import JobFailed
from r1mega.cluster.initial_weights import check_weights
from r1mega.config.derived import mtp_mode, num_nodes
from r1mega.config.schema import Cluster, Config, Learner
from r1mega.data.documents import load_documents
from r1mega.data.prompts import load_prompts
from r1mega.data.tokenizer import load_tokenizer
from r1mega.records import Sequence
from r1mega.rollout import control
from r1mega.rollout.replay import rollout_numbers
from r1mega.system import processes
from r1mega.weights.engine_names import engine_slices
from r1mega.weights.names import Spec


def check_inputs(config: Config) -> None:
    """Raises JobFailed with the sentence that a learner rank would have ended with later."""
    try:
        tokenizer = load_tokenizer(config.model.tokenizer)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"tokenizer {config.model.tokenizer!r} has {tokenizer.vocab_size} tokens but "
                f"model.vocab_size={config.model.vocab_size}: raise it, or choose the model's "
                "tokenizer"
            )
        if config.stage.kind == "sft":
            _check_lengths(load_documents(config.data, tokenizer, config.seed), config)
        elif config.rollout.replay is None:
            load_prompts(config.data, tokenizer, config.seed)
        else:
            rollout_numbers(Path(config.rollout.replay))
        if config.stage.kind != "sft" and config.rollout.replay is None:
            engine_slices(config.model, engine_layout(config), 0)  # a cut that SGLang cannot make
        if config.model.init != "random":
            mtp = mtp_mode(config.learner, config.stage) != "none"
            check_weights(Path(config.model.init), config.model, Spec(mtp=mtp))
        if config.learner.megatron:
            from r1mega.model.transformer_config import check_fields  # seconds: megatron-core

            check_fields(config.model, config.learner.megatron)
    except (ValueError, OSError) as error:
        raise JobFailed(str(error)) from error


def check_packages(learner: Learner) -> None:
    """Raises JobFailed when this environment lacks what an option of the learner runs on."""
    engine = "transformer_engine"
    needed = {
        "learner.layer_spec=transformer_engine": (learner.layer_spec == engine, engine),
        "learner.precision_aware_optimizer=true": (learner.precision_aware_optimizer, engine),
        "learner.optimizer_offload": (learner.optimizer_offload > 0, engine),
        "learner.dispatcher=flex": (learner.dispatcher == "flex", "deep_ep"),
    }
    for setting, (is_set, package) in needed.items():
        if is_set and find_spec(package) is None:
            raise JobFailed(
                f"{setting} needs the package {package}, which this environment does not have: "
                "install it (pip install -e .[cuda] for transformer_engine), or change the setting"
            )


def check_machines(cluster: Cluster) -> None:
    """Raises JobFailed when this machine is not the whole cluster, or cannot listen as told."""
    if (nodes := num_nodes(cluster)) > 1:
        raise JobFailed(
            f"this configuration wants {nodes} nodes (cluster.learner_nodes="
            f"{cluster.learner_nodes}, engine_nodes={cluster.engine_nodes}) but this command "
            "starts the processes of one machine; use a one-node cluster layer"
        )
    if not processes.port_is_free(cluster.host, 0):
        raise JobFailed(
            f"cluster.host={cluster.host} is no address of this machine: name one that servers "
            "here can listen on"
        )
    for key, port in (("master_port", cluster.master_port), ("router_port", cluster.router_port)):
        if port and not processes.port_is_free(cluster.host, port):
            raise JobFailed(
                f"cluster.{key}={port} is taken on {cluster.host}: end what listens there, "
                "choose another port, or 0 for a free one"
            )
    if cluster.master_port and cluster.master_port == cluster.router_port:
        raise JobFailed(
            f"cluster.master_port and cluster.router_port are both {cluster.master_port}: choose "
            "two ports, or 0 for a free one"
        )


def check_key(host: str) -> None:
    """Raises JobFailed when engines would take requests and weights from everyone who asks."""
    if control.api_key() is None and not processes.is_loopback(host):
        raise JobFailed(
            f"cluster.host={host} can be reached from other machines, and engines do what they are "
            f"asked: set the environment variable {control.API_KEY} to a secret on every node, for "
            f"example export {control.API_KEY}=$(openssl rand -hex 32)"
        )


def _check_lengths(documents: list[Sequence], config: Config) -> None:
    longest = max(documents, key=lambda document: len(document.token_ids))
    tokens = len(longest.token_ids)
    for key, limit in (
        ("learner.tokens_per_microbatch", config.learner.tokens_per_microbatch),
        ("model.max_position_embeddings", config.model.max_position_embeddings),
    ):
        if tokens > limit:
            raise ValueError(
                f"document {longest.uid} has {tokens} tokens, which exceeds {key}={limit}: "
                "documents are never cut; raise it, or shorten the document"
            )
