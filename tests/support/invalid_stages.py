"""Invalid stages of specs, rejected by the API server and `sailvl validate` alike; see invalid_specs.py."""

from __future__ import annotations

from tests.support.invalid_specs import ALIGN, DROP, SOURCE, build_table

EVALUATE = "spec.stages.3.evaluate"
JUDGE = "spec.stages[0].curate.judge.server"
ONE_KIND = "exactly one of curate, pretrain, sft, evaluate must be set"

STAGE_SCHEMA = build_table(
    # stages
    (
        "stage with two kinds",
        {"spec.stages.1.sft": {"data": [{"path": "/data/x"}], "epochs": "1"}},
        "spec.stages[1]",
        ONE_KIND,
    ),
    ("stage without a kind", {ALIGN: DROP}, "spec.stages[1]", ONE_KIND),
    ("uppercase stage name", {"spec.stages.1.name": "Align"}, "spec.stages[1].name", "should match"),
    ("stage without a name", {"spec.stages.1.name": DROP}, "spec.stages[1].name", "Required value"),
    ("duplicate stage name", {"spec.stages.1.name": "curate"}, "spec.stages[1]", "Duplicate value"),
    (
        "dependsOn a later stage",
        {"spec.stages.1.dependsOn": ["evaluate"]},
        "spec.stages",
        "stage alignment: dependsOn must name earlier stages",
    ),
    (
        "dependsOn itself",
        {"spec.stages.1.dependsOn": ["alignment"]},
        "spec.stages",
        "stage alignment: dependsOn must name earlier stages",
    ),
    (
        "dependsOn with duplicates",
        {"spec.stages.1.dependsOn": ["curate", "curate"]},
        "spec.stages[1].dependsOn[1]",
        "Duplicate value",
    ),
    (
        "initFrom names a curate stage",
        {"spec.stages.1.initFrom": "curate"},
        "spec.stages",
        "stage alignment: initFrom must name an earlier pretrain or sft stage",
    ),
    (
        "initFrom in a curate stage",
        {
            "spec.stages.3": {
                "name": "again",
                "initFrom": "knowledge",
                "curate": {"sources": [{"format": "procedural", "samples": 1}]},
            }
        },
        "spec.stages",
        "stage again: initFrom must not be set for a curate stage",
    ),
    (
        "evaluate without a training stage",
        {
            "spec.stages.1": DROP,
            "spec.stages.1.sft": DROP,
            "spec.stages.1.curate": {"sources": [{"format": "procedural", "samples": 1}]},
        },
        "spec.stages",
        "stage evaluate: an evaluate stage requires an earlier pretrain or sft stage",
    ),
    # training
    (
        "data from a later stage",
        {f"{ALIGN}.data": [{"from": "evaluate"}]},
        "spec.stages",
        "stage alignment: data[].from must name an earlier curate stage",
    ),
    (
        "data from a training stage",
        {"spec.stages.2.sft.data": [{"from": "alignment"}]},
        "spec.stages",
        "stage knowledge: data[].from must name an earlier curate stage",
    ),
    (
        "data from and path",
        {f"{ALIGN}.data": [{"from": "curate", "path": "/data/x"}]},
        "spec.stages[1].pretrain.data[0]",
        "exactly one of from, path must be set",
    ),
    ("relative path", {f"{ALIGN}.data": [{"path": "x"}]}, "spec.stages[1].pretrain.data[0].path", "should match"),
    ("no data", {f"{ALIGN}.data": []}, "spec.stages[1].pretrain.data", "at least 1"),
    (
        "tokens and epochs",
        {f"{ALIGN}.epochs": "1"},
        "spec.stages[1].pretrain",
        "exactly one of tokens, epochs must be set",
    ),
    (
        "neither tokens nor epochs",
        {f"{ALIGN}.tokens": DROP},
        "spec.stages[1].pretrain",
        "exactly one of tokens, epochs must be set",
    ),
    ("zero tokens", {f"{ALIGN}.tokens": "0"}, "spec.stages[1].pretrain.tokens", "should match"),
    ("count below 1", {f"{ALIGN}.batchTokens": "0.0000000001K"}, "spec.stages[1].pretrain.batchTokens", "should match"),
    (
        "count above 64 bits",
        {f"{ALIGN}.tokens": "9999999999999.9T"},
        "spec.stages[1].pretrain.tokens",
        "should match",
    ),
    ("unknown count suffix", {f"{ALIGN}.tokens": "131G"}, "spec.stages[1].pretrain.tokens", "should match"),
    ("zero epochs", {"spec.stages.2.sft.epochs": "0"}, "spec.stages[2].sft.epochs", "must be greater than 0"),
    (
        "learning rate is a float",
        {f"{ALIGN}.learningRate": 2e-4},
        "spec.stages[1].pretrain.learningRate",
        "must be of type string",
    ),
    (
        "learning rate is not a number",
        {f"{ALIGN}.learningRate": "fast"},
        "spec.stages[1].pretrain.learningRate",
        "should match",
    ),
    (
        "zero learning rate",
        {f"{ALIGN}.learningRate": "0.0"},
        "spec.stages[1].pretrain.learningRate",
        "must be greater than 0",
    ),
    ("warm-up fraction of 1", {f"{ALIGN}.warmup": "1.0"}, "spec.stages[1].pretrain.warmup", "less than 1"),
    ("unknown model part", {f"{ALIGN}.train": ["head"]}, "spec.stages[1].pretrain.train[0]", '"connector"'),
    (
        "duplicate model part",
        {f"{ALIGN}.train": ["connector", "connector"]},
        "spec.stages[1].pretrain.train[1]",
        "Duplicate value",
    ),
    # curation
    (
        "imagefolder without a path",
        {f"{SOURCE}.path": DROP},
        "spec.stages[0].curate.sources[0]",
        "path is required for this format",
    ),
    (
        "procedural without samples",
        {SOURCE: {"format": "procedural"}},
        "spec.stages[0].curate.sources[0]",
        "samples is required for the format procedural",
    ),
    (
        "procedural with a path",
        {SOURCE: {"format": "procedural", "samples": 9, "path": "/data/x"}},
        "spec.stages[0].curate.sources[0]",
        "path must not be set for the format procedural",
    ),
    ("unknown source format", {f"{SOURCE}.format": "zip"}, "spec.stages[0].curate.sources[0].format", '"webdataset"'),
    (
        "held-out fraction of 1",
        {"spec.stages.0.curate.heldOutFraction": "1"},
        "spec.stages[0].curate.heldOutFraction",
        "less than 1",
    ),
    (
        "server URL without a scheme",
        {"spec.stages.0.curate.judge": {"server": "judge:8000"}},
        "spec.stages[0].curate.judge.server",
        "should match",
    ),
    *(
        (f"server URL with {what}", {"spec.stages.0.curate.judge": {"server": url}}, JUDGE, "should match")
        for what, url in (
            ("a user name", "http://user:secret@judge"),
            ("a backslash", "http://judge\\@evil"),
            ("a line break", "http://judge\n"),
            ("no host", "http:///v1"),
        )
    ),
    # evaluation
    (
        "unknown benchmark",
        {EVALUATE: {"benchmarks": ["MMStar", "MMFoo"], "data": "/data/b"}},
        "spec.stages[3].evaluate.benchmarks",
        "MMFoo: unknown benchmark; use all, MMStar",
    ),
    (
        "benchmarks without data",
        {EVALUATE: {"benchmarks": ["all"]}},
        "spec.stages[3].evaluate",
        "is required if benchmarks is set",
    ),
    (
        "evaluate without benchmarks",
        {EVALUATE: {}},
        "spec.stages[3].evaluate",
        "at least one of benchmarks, custom must be set",
    ),
    (
        "unknown metric",
        {f"{EVALUATE}.custom.0.metric": "bleu"},
        "spec.stages[3].evaluate.custom[0].metric",
        '"exact_match"',
    ),
    (
        "gate on a held-out loss that is not measured",
        {f"{ALIGN}.heldOutSamples": 0, "spec.stages.1.gate": {"metric": "heldOutLoss", "atMost": "2"}},
        "spec.stages[1].pretrain.heldOutSamples",
        "the gate needs a held-out loss; set heldOutSamples to more than 0",
    ),
    (
        "gate without a bound",
        {"spec.stages.1.gate": {"metric": "heldOutLoss"}},
        "spec.stages[1].gate",
        "at least one of atMost, atLeast must be set",
    ),
)
