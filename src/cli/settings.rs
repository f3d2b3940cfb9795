//! Flags that go over the configuration file: one for each key that is not in a list.

use crate::config::Overrides;

/// Values are read with the file, so that their mistakes are reported together with those of the file.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Settings over the configuration file")]
pub(super) struct Settings {
    /// Name of this site.
    #[arg(long, value_name = "NAME", env = "LONGHAUL_SITE")]
    site: Option<String>,

    /// Directory of everything that outlives the process.
    #[arg(long, value_name = "DIRECTORY", env = "LONGHAUL_STATE_DIR")]
    state_dir: Option<String>,

    /// UDP address of the control connection; bulk data uses the next port.
    #[arg(long, value_name = "ADDRESS", env = "LONGHAUL_LISTEN")]
    listen: Option<String>,

    /// Address under which other sites reach this gateway.
    #[arg(long, value_name = "HOST:PORT", env = "LONGHAUL_ADVERTISE")]
    advertise: Option<String>,

    /// Memory for caches and queues, such as 512mib.
    #[arg(long, value_name = "SIZE", env = "LONGHAUL_MEMORY_BUDGET")]
    memory_budget: Option<String>,

    /// Capacity of the link, such as 1gbit.
    #[arg(long, value_name = "RATE", env = "LONGHAUL_LINK_RATE")]
    link_rate: Option<String>,

    /// RTT to the farthest peer, such as 150ms.
    #[arg(long, value_name = "DURATION", env = "LONGHAUL_LINK_RTT")]
    link_rtt: Option<String>,

    /// TCP address of the metrics, or off.
    #[arg(long, value_name = "ADDRESS", env = "LONGHAUL_METRICS_LISTEN")]
    metrics_listen: Option<String>,

    /// Longest downtime that is accepted, such as 500ms.
    #[arg(long, value_name = "DURATION", env = "LONGHAUL_MIGRATION_DOWNTIME_LIMIT")]
    migration_downtime_limit: Option<String>,

    /// What becomes of the source's process: quit or leave.
    #[arg(long, value_name = "ACTION", env = "LONGHAUL_MIGRATION_AFTER_SUCCESS")]
    migration_after_success: Option<String>,

    /// Longest time until switchover, such as 30m.
    #[arg(long, value_name = "DURATION", env = "LONGHAUL_MIGRATION_DEADLINE")]
    migration_deadline: Option<String>,

    /// How long a migration waits for a peer that cannot be reached: migration.longest_cut.
    #[arg(long, env = "LONGHAUL_MIGRATION_LONGEST_CUT", value_name = "DURATION")]
    migration_longest_cut: Option<String>,

    /// How often a migration that the restart of a gateway has undone is begun again; 0: never.
    #[arg(long, value_name = "N", env = "LONGHAUL_MIGRATION_RESTARTS")]
    migration_restarts: Option<String>,

    /// Cap of each migration, such as 800mbit.
    #[arg(long, value_name = "RATE", env = "LONGHAUL_MIGRATION_RATE")]
    migration_rate: Option<String>,

    /// How often a VM that has arrived is announced to its network.
    #[arg(long, value_name = "NUMBER", env = "LONGHAUL_MIGRATION_ANNOUNCE_ROUNDS")]
    migration_announce_rounds: Option<String>,

    /// Executable that runs as one more check of a migration.
    #[arg(long, value_name = "FILE", env = "LONGHAUL_HOOKS_PRE_CHECK")]
    hooks_pre_check: Option<String>,

    /// Executable that runs at the source before the VM can be stopped.
    #[arg(long, value_name = "FILE", env = "LONGHAUL_HOOKS_BEFORE_SWITCHOVER")]
    hooks_before_switchover: Option<String>,

    /// Executable that runs once the VM runs at the destination.
    #[arg(long, value_name = "FILE", env = "LONGHAUL_HOOKS_AFTER_ACTIVATION")]
    hooks_after_activation: Option<String>,

    /// Executable that runs once a migration that had begun has failed.
    #[arg(long, value_name = "FILE", env = "LONGHAUL_HOOKS_AFTER_FAILURE")]
    hooks_after_failure: Option<String>,

    /// Longest time for each of them, such as 10s.
    #[arg(long, value_name = "DURATION", env = "LONGHAUL_HOOKS_TIME_LIMIT")]
    hooks_time_limit: Option<String>,

    /// Least severe level that is logged: error, warn, info, debug, trace.
    #[arg(long, value_name = "LEVEL", env = "LONGHAUL_LOG_LEVEL")]
    log_level: Option<String>,

    /// Shape of log lines: text or json.
    #[arg(long, value_name = "FORMAT", env = "LONGHAUL_LOG_FORMAT")]
    log_format: Option<String>,
}

impl Settings {
    pub(super) fn overrides(&self) -> Overrides {
        let mut overrides = Overrides::default();
        for (key, value) in [
            ("site", &self.site),
            ("state_dir", &self.state_dir),
            ("listen", &self.listen),
            ("advertise", &self.advertise),
            ("memory_budget", &self.memory_budget),
            ("link.rate", &self.link_rate),
            ("link.rtt", &self.link_rtt),
            ("metrics.listen", &self.metrics_listen),
            ("migration.downtime_limit", &self.migration_downtime_limit),
            ("migration.after_success", &self.migration_after_success),
            ("migration.deadline", &self.migration_deadline),
            ("migration.longest_cut", &self.migration_longest_cut),
            ("migration.restarts", &self.migration_restarts),
            ("migration.rate", &self.migration_rate),
            ("migration.announce_rounds", &self.migration_announce_rounds),
            ("hooks.pre_check", &self.hooks_pre_check),
            ("hooks.before_switchover", &self.hooks_before_switchover),
            ("hooks.after_activation", &self.hooks_after_activation),
            ("hooks.after_failure", &self.hooks_after_failure),
            ("hooks.time_limit", &self.hooks_time_limit),
            ("log.level", &self.log_level),
            ("log.format", &self.log_format),
        ] {
            overrides.set(key, value.as_deref());
        }
        overrides
    }
}
