"""Every key of a training run, with its unit and where its default comes from. The other files say only what differs.

Change a key on the command line: `--config.learning_rate=2e-5`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The paper's stage 3 (PAPER §3), but for data, which must be given."""
    config = ConfigDict()
    config.name = "m3"
    config.output = "runs/m3"  # the run's directory; the same command goes on where an earlier run stopped
    config.seed = 0  # of random weights, data order and dropout

    # The model: `init_from` is a released directory, a checkpoint of ours or a hub name (owner/name); "" makes random weights
    # of these sizes.
    config.init_from = ""
    config.heads = "require"  # "init": random heads where `init_from` has none
    config.model = ConfigDict()  # names as in m3jax.M3Config; used for random weights only
    config.model.hidden_size = 1024
    config.model.num_hidden_layers = 24
    config.model.num_attention_heads = 16
    config.model.intermediate_size = 4096
    config.model.max_position_embeddings = 8194
    config.tokenizer = ""  # a tokenizer.json, for random weights; "" is the demo's own where data.train is "cldr"

    config.data = ConfigDict()
    # JSONL files {"query", "pos", "neg"} or folders of them, separated by commas; "cldr" is the embedded demo set.
    config.data.train = ""
    config.data.dev = ""  # a folder {corpus, test_queries, test_qrels}.jsonl, measured during training; "" is none
    config.data.test = ""  # such folders, separated by commas, measured after training; "" is none
    config.data.folder = "runs/data"  # where tokenised rows are kept between runs
    config.query_max_length = 512  # tokens; PAPER §3
    config.passage_max_length = 8192  # tokens; PAPER §3

    # Batches: rows of one length group at a time, (longest text in tokens, queries in the global batch); PAPER §4, stage 3.
    config.length_groups = (
        (500, 1152), (1000, 768), (2000, 480), (3000, 432), (4000, 336), (5000, 336), (6000, 288), (7000, 240), (8192, 192),
    )  # fmt: skip
    config.group_size = 8  # passages a query: 1 positive, the others negatives; PAPER §3

    config.steps = 10000
    config.learning_rate = 1e-5  # at its highest; reference code
    config.warmup = 0.1  # share of the steps; PAPER §3
    config.weight_decay = 0.01  # PAPER §3
    config.clip = 1.0  # global norm; reference code
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.adam_eps = 1e-8
    config.temperature = 0.02  # PAPER §2
    config.hybrid_weights = (1.0, 0.3, 1.0)  # w of dense, sparse, colbert in the loss, not in measuring; PAPER §2, v4
    config.loss_weights = (1.0, 0.1, 1.0)  # λ of dense, sparse, colbert; PAPER §2, v4
    config.distill_start = 6000  # the step at which self-distillation starts, -1 is never; PAPER §2
    config.dropout = 0.0  # on hidden states only: fused attention has none (the reference trains with 0.1 on both)
    config.dtype = "float32"  # of the matrix products: "float32" or "bfloat16"; parameters and sums are float32
    config.remat = True  # keep one activation a layer and compute the others again: less memory, a third more work

    config.mesh = ConfigDict()  # devices along each axis, -1 is the rest; m3jax/sharding.py
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.plan_only = False  # say what the run would take (rows, batches, memory, FLOPs, time, disk), and stop

    config.log_every = 10  # steps
    config.evaluate_every = 1000  # steps, on data.dev
    config.evaluate_untrained = True  # measure data.test before the first step too
    config.example = ConfigDict()  # one query of the first test set, shown with what each function finds
    config.example.query = "*"  # the first query whose id matches
    config.example.language = ""  # its language, in words
    config.save_every = 1000  # steps
    config.checkpoints = ""  # where they go, a folder or gs://bucket/folder; "" is the folder `checkpoints` of `output`
    config.keep_checkpoints = 2  # the last ones
    config.keep_best = "dev/all/ndcg_at_10"  # and the one with the highest such score on data.dev; "" keeps none for it
    return config
