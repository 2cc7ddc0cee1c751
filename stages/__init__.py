"""The pipeline. Files are stages, folders are parts.

    collect_text       a Python installation        -> sample text of several kinds      (for the demo)
    tokenize_text      text files                   -> Arrow token shards, tokenizer
    cluster_documents  tokens                       -> a cluster for every document      (cBTM)
    train_seed         tokens                       -> the decoder all experts start from
    train_experts      seed, clusters               -> one expert per cluster, and the dense baseline
    train_gates        experts                      -> when each expert is worth asking  (PHATGOOSE)
    compose_model      seed, experts, gates         -> the central concept model, bridged (CALM)
    evaluate_models    everything so far            -> bits per byte, table and plot
    generate_text      any of the models            -> text
    submit_jobs        all of the settings          -> the pipeline as jobs of Slurm

A stage is `run(config, run_dir, …) -> Manifest`. Stages never import each other: they meet only through manifests.
Parts never import each other either: a stage file is the only place where parts meet.
"""
