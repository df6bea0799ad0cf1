//! Finds Xen's libraries, and generates the bindings that `raw` includes.
//!
//! Fails with the names of the Debian packages when the headers, pkg-config or libclang are
//! missing, rather than with a panic out of a library.

use std::env;
use std::fmt::Display;
use std::panic;
use std::path::PathBuf;
use std::process::exit;

/// The pkg-config names of the libraries that the safe layer calls.
const LIBRARIES: [&str; 6] = [
    "xenlight",
    "xencontrol",
    "xenguest",
    "xenforeignmemory",
    "xenstore",
    "xentoollog",
];

/// The oldest Xen whose interfaces the safe layer knows.
const OLDEST_XEN: &str = "4.17";

/// The functions that are bound.
const FUNCTIONS: &[&str] = &[
    // libxenctrl
    "xc_interface_open",
    "xc_interface_close",
    "xc__hypercall_buffer_(alloc|free)_pages",
    "xc_version",
    "xc_physinfo",
    "xc_domctl",
    "xc_domain_getinfolist",
    "xc_domain_get_guest_width",
    "xc_domain_maximum_gpfn",
    "xc_domain_nr_gpfns",
    "xc_domain_claim_pages",
    "xc_domain_get_pod_target",
    "xc_domain_pause",
    "xc_domain_unpause",
    "xc_domain_get_tsc_info",
    "xc_domain_hvm_getcontext",
    "xc_hvm_param_get",
    "xc_shadow_control",
    "xc_vcpu_getinfo",
    "xc_vcpu_getcontext",
    "xc_maximum_ram_page",
    "xc_gnttab_get_version",
    "xc_gnttab_map_table_v(1|2)",
    // libxenguest
    "xc_map_m2p",
    "xc_cpu_policy_(init|destroy|get_system|get_domain|get_size|serialise|is_compatible)",
    "xc_cpu_policy_update_(cpuid|msrs)",
    // libxenforeignmemory
    "xenforeignmemory_(open|close|map|unmap)",
    // libxenstore
    "xs_(open|close|read|write|rm|mkdir|directory|watch|unwatch|check_watch|fileno)",
    "xs_transaction_(start|end)",
    // libxl
    "libxl_ctx_(alloc|free)",
    "libxl_childproc_setmode",
    "libxl_error_to_string",
    "libxl_event_(check|free|register_callbacks)",
    "libxl_osevent_(beforepoll|afterpoll)",
    "libxl_ev(enable|disable)_domain_death",
    "libxl_ao_abort",
    "libxl_name_to_domid",
    "libxl_domid_to_name",
    "libxl_domain_info",
    "libxl_dominfo_(init|dispose)",
    "libxl_list_domain",
    "libxl_dominfo_list_free",
    "libxl_domain_(rename|pause|unpause|destroy|shutdown|resume|suspend_only)",
    "libxl_domain_(core_dump|preserve)",
    "libxl_domain_sched_params_(init|dispose|get|set)",
    "libxl_domain_create_(new|restore)",
    "libxl_domain_restore_params_(init|dispose)",
    "libxl_domain_config_(init|dispose|to_json|from_json)",
    "libxl_retrieve_domain_configuration",
    "libxl_domain_need_memory",
    "libxl_get_free_memory",
    "libxl_userdata_(store|retrieve)",
    "libxl_device_(disk|nic)_add",
    "libxl_device_(disk|nic|pci)_list",
    "libxl_device_(disk|nic|pci)_list_free",
    // the C library: formats a logger's message
    "vsnprintf",
];

/// The functions that only the `oracle` feature may call: the stock saver ends the process when
/// one of its assertions fails.
const ORACLE_FUNCTIONS: &[&str] = &["xc_domain_save", "xc_(map|unmap)_domain_meminfo"];

/// The types that are named by the safe layer beyond those that the functions pull in.
const TYPES: &[&str] = &[
    "xen_domctl",
    "xen_domctl_.*",
    "xen_sysctl_physinfo",
    "xen_extraversion_t",
    "xen_capabilities_info_t",
    "xen_cpuid_leaf_t",
    "xen_msr_entry_t",
    "vcpu_guest_context_x86_64_t",
    "shared_info_x86_64_t",
    "start_info_t",
    "save_callbacks",
    "xc_domain_meminfo",
];

/// The constants that are named by the safe layer and its callers.
const CONSTANTS: &[&str] = &[
    "XEN_DOMCTL_.*",
    "XEN_DOMINF_.*",
    "XEN_INVALID_MAX_VCPU_ID",
    "XEN_SYSCTL_PHYSCAP_.*",
    "XEN_SYSCTL_cpu_policy_.*",
    "XEN_SYSCTL_INTERFACE_VERSION",
    "XENVER_.*",
    "XENFEAT_.*",
    "HVM_PARAM_.*",
    "HVM_NR_PARAMS",
    "SHUTDOWN_.*",
    "GTF_.*",
    "XCFLAGS_.*",
    "XBT_NULL",
    "LIBXL_VERSION",
    "LIBXL_SHUTDOWN_REASON_.*",
    "LIBXL_EVENT_TYPE_.*",
    "LIBXL_DOMAIN_TYPE_.*",
    "VGCF_.*",
];

fn main() {
    println!("cargo::rerun-if-changed=wrapper.h");
    println!("cargo::rerun-if-changed=layout.c");

    let include_paths = find_libraries();
    generate_bindings(&include_paths);
    compile_layout_probe(&include_paths);
}

/// Asks pkg-config for each library, and returns where their headers are.
fn find_libraries() -> Vec<PathBuf> {
    let mut include_paths = Vec::new();
    for library in LIBRARIES {
        match pkg_config::Config::new()
            .atleast_version(minimum_version(library))
            .probe(library)
        {
            Ok(found) => {
                include_paths.extend(found.include_paths);
                if library == "xencontrol" {
                    println!("cargo::rustc-env=XEN_LIBRARIES_VERSION={}", found.version);
                }
            }
            Err(pkg_config::Error::Command { cause, .. }) => give_up("pkg-config", &cause),
            Err(error) => give_up(
                &format!("the Xen library {library} ({OLDEST_XEN} or newer)"),
                &error,
            ),
        }
    }
    include_paths.sort();
    include_paths.dedup();
    include_paths
}

/// Libraries with an ABI of their own carry their own version numbers; these two carry Xen's.
fn minimum_version(library: &str) -> &'static str {
    match library {
        "xenlight" | "xencontrol" | "xenguest" => OLDEST_XEN,
        _ => "0",
    }
}

fn generate_bindings(include_paths: &[PathBuf]) {
    // bindgen loads libclang when it first needs it, and panics when there is none: find out
    // beforehand, with the panic's own message kept quiet.
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let libclang = panic::catch_unwind(bindgen::clang_version);
    panic::set_hook(hook);
    if libclang.is_err() {
        give_up(
            "libclang",
            &"it is neither in the usual places nor in LIBCLANG_PATH",
        );
    }

    let mut builder = bindgen::Builder::default()
        .header("wrapper.h")
        .clang_args(
            include_paths
                .iter()
                .map(|path| format!("-I{}", path.display())),
        )
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()))
        .rust_target(rust_target())
        .rust_edition(bindgen::RustEdition::Edition2024)
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .derive_default(true)
        .derive_copy(true)
        .generate_comments(false)
        .layout_tests(true);
    for function in FUNCTIONS {
        builder = builder.allowlist_function(function);
    }
    if env::var_os("CARGO_FEATURE_ORACLE").is_some() {
        for function in ORACLE_FUNCTIONS {
            builder = builder.allowlist_function(function);
        }
    }
    for name in TYPES {
        builder = builder.allowlist_type(name);
    }
    for name in CONSTANTS {
        builder = builder.allowlist_var(name);
    }
    let bindings = match builder.generate() {
        Ok(bindings) => bindings,
        Err(error) => give_up("usable headers of Xen and the C library", &error),
    };
    if let Err(error) = bindings.write_to_file(out_dir().join("bindings.rs")) {
        give_up("a writable output directory", &error);
    }
}

/// The oldest compiler that the workspace allows.
fn rust_target() -> bindgen::RustTarget {
    match env!("CARGO_PKG_RUST_VERSION").parse() {
        Ok(target) => target,
        Err(error) => give_up("a rust-version that bindgen knows", &error),
    }
}

/// Compiles the table of sizes and offsets that the layout test compares the bindings with.
fn compile_layout_probe(include_paths: &[PathBuf]) {
    let built = cc::Build::new()
        .file("layout.c")
        .includes(include_paths)
        .warnings(true)
        .try_compile("xen_sys_layout");
    if let Err(error) = built {
        give_up("a C compiler that accepts Xen's headers", &error);
    }
}

fn out_dir() -> PathBuf {
    match env::var_os("OUT_DIR") {
        Some(path) => PathBuf::from(path),
        None => give_up(
            "the environment of a cargo build script",
            &"OUT_DIR is not set",
        ),
    }
}

/// Ends the build with what is missing, why we think so, and how to get it.
fn give_up(missing: &str, reason: &dyn Display) -> ! {
    eprintln!("VMShadow needs {missing}, and could not use it here:");
    eprintln!("  {reason}");
    eprintln!();
    eprintln!("On Debian and Ubuntu, this installs what the build needs:");
    eprintln!("  apt-get install libxen-dev libclang-dev pkg-config gcc libc6-dev");
    exit(1)
}
