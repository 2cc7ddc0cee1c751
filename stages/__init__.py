"""The pipeline. Files are stages, folders are parts.

    collect_text       a Python installation        -> sample text of several kinds      (for the demo)
    tokenize_text      text files                   -> Arrow token shards, tokenizer
    cluster_documents  tokens                       -> a cluster for every document      (cBTM)
    train_seed         tokens                       -> the decoder all experts start from
    train_experts      seed, clusters               -> one expert per cluster, and the dense baseline
    train_gates        experts                      -> when each expert is worth asking  (PHATGOOSE)
    compose_model      seed, experts, gates         -> the central concept model, bridged (CALM)
    evaluate_models    everything so far            -> bits per byte, table and plot
    import_model       a Hugging Face folder        -> the seed
    export_model       a model of the run           -> a Hugging Face folder
    plan_training      the settings                 -> what they would train, and its cost
    generate_text      any of the models            -> text
    route_text         seed, gates                  -> which experts a text asks for
    submit_jobs        all of the settings          -> the pipeline as jobs of Slurm
    verify_run         a whole run                  -> what is not as its manifests say
    clean_run          a whole run                  -> what nothing needs any more, removed
    report_run         a whole run                  -> one page about it

A stage is `run(config, run_dir, …) -> Manifest`; those that only read, write or tidy are `stream(config, run_dir)`.
Stages never import each other: they meet only through manifests.
Parts never import each other either: a stage file is the only place where parts meet.
"""
