"""Every key of a training run, with its unit and where its default comes from. The other files say only what differs.

Change a key on the command line: `--config.learning_rate=2e-5`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The paper's stage 3 (PAPER §3), but for data, which must be given."""
    config = ConfigDict()
    # "contrastive", of queries and passages, or "retromae", of plain texts: stage 1, which reads the keys of its own below and
    # refuses those of the other that would do nothing.
    config.stage = "contrastive"
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
    config.model.colbert_dim = (
        0  # width of colbert vectors; 0 is hidden_size. With heads="init", of a new colbert head too
    )
    config.tokenizer = ""  # a tokenizer.json, for random weights; "" is the demo's own where data.train is "cldr"

    config.data = ConfigDict()
    # JSONL files {"query", "pos", "neg"} or folders of them, separated by commas, each a dataset; tfds:NAME is one of TFDS
    # whose features have these names (train/data/tfds_sets.py), "cldr" the embedded demo set. Rows of a dataset whose name
    # ends in no_in_batch_neg are trained on their own passages alone.
    # In stage 1 plain texts: .jsonl {"text"}, .txt (a text a line), folders of them, "cldr", or tfds:NAME with a
    # feature `text`.
    config.data.train = ""
    config.data.same_dataset = True  # the rows of a batch are of one dataset; FlagEmbedding's script for M3
    # Of the datasets, in order: how often each row comes in a round of all; () is once. Rows too few for a batch share those of
    # another dataset, with the mean of their weights, and a warning says so.
    config.data.weights = ()
    config.data.dev = ""  # a folder {corpus, test_queries, test_qrels}.jsonl, measured during training; "" is none
    # (in stage 1 held-out texts, as data.train)
    config.data.test = ""  # such folders, separated by commas, measured after training; "" is none
    # The share of the different queries of data.train that are held out with their rows, at most 1,000: they are measured
    # before and after training, and as data.dev where none is given. Pairs of them the other way round are not trained either.
    config.data.held_out = 0.0
    config.data.folder = "runs/data"  # where tokenised rows are kept between runs
    config.query_max_length = 512  # tokens; PAPER §3
    config.passage_max_length = 8192  # tokens, in stage 1 of a text; PAPER §3

    # Batches: rows of one length group at a time, (longest text in tokens, queries in the global batch). () is PAPER §4's
    # nine groups to 8,192 tokens: for each device that shares the rows, 48 to 8 queries, or with group_size = 1 700 to 104. A
    # run that goes on keeps the batches that it began with, on any devices.
    config.length_groups = ()
    config.group_size = 8  # passages a query: 1 positive, the others negatives; PAPER §3
    # The probability that a passage of 32 tokens or more has its thirds in a random order; PAPER §3, stage 2: 0.002.
    config.shuffle_segments = 0.0

    # Tokens of queries or passages that a device encodes at a time, one row at least; larger batches go through in equal parts,
    # with the exact gradients of the whole. 0: as many as its memory holds, found by compiling, for each length group.
    config.sub_batch_tokens = 0
    config.accumulate = 1  # batches whose gradients are averaged before the parameters change

    config.functions = ("dense", "sparse", "colbert")  # what is trained; with several, their hybrid too
    config.frozen = ()  # what stays as it is: "encoder", "positions" (their table), "sparse", "colbert" (the heads)
    config.matryoshka = (
        ConfigDict()
    )  # shorter vectors trained beside the full ones, by their widths; their losses are averaged
    config.matryoshka.dense = ()
    config.matryoshka.colbert = ()

    # Stage 1, PAPER §3: the share of a text's tokens that the encoder reads as <mask>, and the probability with which a
    # position of the decoder sees each other one.
    config.encoder_mask = 0.3
    config.decoder_seen = 0.5

    config.steps = 10000  # batches; 0: as many as `epochs` take
    config.epochs = 0.0  # rounds of all rows, where steps = 0
    config.learning_rate = 1e-5  # at its highest; reference code
    config.learning_rate_scale = ConfigDict()  # factors of the learning rate
    config.learning_rate_scale.encoder = 1.0
    config.learning_rate_scale.sparse = 1.0
    config.learning_rate_scale.colbert = 1.0
    config.warmup = 0.1  # share of the steps; PAPER §3
    config.weight_decay = 0.01  # PAPER §3
    config.clip = 1.0  # global norm; reference code
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.adam_eps = 1e-8
    config.temperature = 0.02  # PAPER §2
    # PAPER §2: "v4", or "v1", whose weights are all 1 and which adds L and L' in place of averaging them.
    config.objective = "v4"
    # w of dense, sparse, colbert in the loss and in the scores on data.dev, not in those on data.test, which are ranked as
    # m3jax.search ranks; () is (1, 0.3, 1), in v1 all 1.
    config.hybrid_weights = ()
    config.loss_weights = ()  # λ of dense, sparse, colbert; () is (1, 0.1, 1), in v1 all 1
    # Rows' pos_scores and neg_scores: "" leaves them, "group" adds a soft cross-entropy on the row's own passages, and
    # "sequential" has each passage beat those that the teacher puts below it (FlagEmbedding's kl_div and m3_kd_loss).
    config.teacher = ""
    config.teacher_temperature = 1.0  # the scores are divided by it; FlagEmbedding
    config.distill_start = 6000  # the step at which self-distillation starts, -1 is never; PAPER §2
    config.dropout = 0.0  # on hidden states only: fused attention has none (the reference trains with 0.1 on both)
    config.dtype = "float32"  # of the matrix products: "float32" or "bfloat16"; parameters and sums are float32
    # What the backward pass computes again of each layer, to save memory: "elements" (what goes element by element),
    # "all_but_products" (of matrices with weights: attention too) or "all", a third more work.
    config.remat = "all"

    # "" is one process; "auto" joins those that SLURM, Kubernetes, Open MPI or a TPU pod started, as JAX detects them;
    # "HOST:PORT,COUNT,INDEX" names the first process's address, how many there are and which this is.
    config.distributed = ""
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
