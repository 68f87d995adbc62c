"""Models: references to them, loading, what their blocks are made of, and saving."""

from __future__ import annotations

from tmerge.models.adapter_changes import AdapterChanges
from tmerge.models.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tmerge.models.adapter_saving import AdapterSize, ModuleChange, save_adapter, verify_adapter
from tmerge.models.checkpoint import LICENCE_FOLDER, file_digest
from tmerge.models.configs import meta_model
from tmerge.models.demo import DEMO_MODELS, DemoModel, demo_path
from tmerge.models.device import available_memory, fits, give_back_memory, multiplies_fast, pick_device, pick_dtype
from tmerge.models.discovery import find_block_list
from tmerge.models.facts import AdapterFacts, ModelFacts, read_facts
from tmerge.models.head import read_logits, rows_at_once
from tmerge.models.joined import AdapterWeights, NoWeights
from tmerge.models.licence_files import licence_files, source_licence_files, write_licence_files
from tmerge.models.licences import OutputLicence, output_licence
from tmerge.models.loading import LoadedModel, load_model, load_tokenizer, model_commit
from tmerge.models.model import Model, pinned, shared_vocabulary
from tmerge.models.projections import (
    PROJECTIONS,
    SIDES,
    Architecture,
    HeadLayout,
    Projection,
    Rows,
    Tap,
    describe,
    feature_key,
    match,
)
from tmerge.models.readout import LastNorm, Readout
from tmerge.models.reference import ModelReference, trusts
from tmerge.models.remote import Snapshot, fetch, hub_errors, open_repo
from tmerge.models.rotary import head_facts
from tmerge.models.saving import save_checkpoint
from tmerge.models.settings import CONFIG, least_release
from tmerge.models.stream import EMBEDDING, HEAD, HEAD_NORMS, STREAM, group_of
from tmerge.models.tokenizers import refuse_without_rows
from tmerge.models.verifying import verify_checkpoint
from tmerge.models.weights import MappedWeights, read_weights_file, write_weights

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "CONFIG",
    "DEMO_MODELS",
    "EMBEDDING",
    "HEAD",
    "HEAD_NORMS",
    "LICENCE_FOLDER",
    "PROJECTIONS",
    "SIDES",
    "STREAM",
    "AdapterChanges",
    "AdapterFacts",
    "AdapterSize",
    "AdapterWeights",
    "Architecture",
    "DemoModel",
    "HeadLayout",
    "LastNorm",
    "LoadedModel",
    "MappedWeights",
    "Model",
    "ModelFacts",
    "ModelReference",
    "ModuleChange",
    "NoWeights",
    "OutputLicence",
    "Projection",
    "Readout",
    "Rows",
    "Snapshot",
    "Tap",
    "available_memory",
    "demo_path",
    "describe",
    "feature_key",
    "fetch",
    "find_block_list",
    "fits",
    "give_back_memory",
    "file_digest",
    "group_of",
    "head_facts",
    "hub_errors",
    "least_release",
    "licence_files",
    "load_model",
    "load_tokenizer",
    "match",
    "meta_model",
    "model_commit",
    "multiplies_fast",
    "open_repo",
    "output_licence",
    "pick_device",
    "pick_dtype",
    "pinned",
    "read_facts",
    "read_logits",
    "read_weights_file",
    "refuse_without_rows",
    "rows_at_once",
    "save_adapter",
    "save_checkpoint",
    "shared_vocabulary",
    "source_licence_files",
    "trusts",
    "verify_adapter",
    "verify_checkpoint",
    "write_licence_files",
    "write_weights",
]
