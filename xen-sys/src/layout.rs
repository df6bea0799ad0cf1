//! Compares the bindings with the real headers, as a C compiler reads them.

use std::collections::BTreeSet;
use std::ffi::{CString, c_char};
use std::mem::offset_of;

use crate::memory::{shared_info, start_info};
use crate::raw;

unsafe extern "C" {
    fn xen_sys_layout(name: *const c_char) -> usize;
    fn xen_sys_layout_entries() -> usize;
}

/// What the C compiler says.
fn in_c(name: &str) -> usize {
    let c_name = CString::new(name).unwrap();
    // SAFETY: the name is a C string; the function looks it up in a constant table.
    let value = unsafe { xen_sys_layout(c_name.as_ptr()) };
    assert_ne!(value, usize::MAX, "layout.c has no entry {name}");
    value
}

#[test]
fn sizes_and_offsets_are_those_of_the_headers() {
    let mut seen = BTreeSet::new();
    macro_rules! size {
        ($name:literal, $type:ty) => {
            assert_eq!(size_of::<$type>(), in_c($name), "size of {}", $name);
            assert!(seen.insert($name), "{} twice", $name);
        };
    }
    macro_rules! offset {
        ($name:literal, $type:ty, $field:ident) => {
            offset!($name, = offset_of!($type, $field));
        };
        ($name:literal, = $value:expr) => {
            assert_eq!($value, in_c($name), "offset of {}", $name);
            assert!(seen.insert($name), "{} twice", $name);
        };
    }

    // Entries are read as words.
    assert_eq!(in_c("grant_entry_v1_t"), 8);
    assert_eq!(in_c("grant_entry_v1_t.frame"), 4);
    assert_eq!(in_c("grant_entry_v2_t"), 16);
    assert_eq!(in_c("grant_entry_v2_t.full_page.frame"), 8);
    assert_eq!(in_c("grant_entry_v2_t.sub_page.frame"), 8);
    seen.extend([
        "grant_entry_v1_t",
        "grant_entry_v1_t.frame",
        "grant_entry_v2_t",
        "grant_entry_v2_t.full_page.frame",
        "grant_entry_v2_t.sub_page.frame",
    ]);

    type Vcpu = raw::vcpu_guest_context_x86_64;
    size!("vcpu_guest_context_x86_64_t", Vcpu);
    offset!("vcpu_guest_context_x86_64_t.user_regs", Vcpu, user_regs);
    offset!(
        "vcpu_guest_context_x86_64_t.user_regs.rdx",
        = offset_of!(Vcpu, user_regs) + offset_of!(raw::cpu_user_regs_x86_64, __bindgen_anon_13)
    );
    offset!("vcpu_guest_context_x86_64_t.flags", Vcpu, flags);
    offset!("vcpu_guest_context_x86_64_t.gdt_frames", Vcpu, gdt_frames);
    offset!("vcpu_guest_context_x86_64_t.gdt_ents", Vcpu, gdt_ents);
    offset!("vcpu_guest_context_x86_64_t.ctrlreg", Vcpu, ctrlreg);
    size!("vcpu_guest_context_any_t", raw::vcpu_guest_context_any_t);

    size!("shared_info_x86_64_t", raw::shared_info_x86_64);
    offset!("shared_info_x86_64_t.arch.max_pfn", = shared_info::offset::MAX_PFN);
    offset!(
        "shared_info_x86_64_t.arch.pfn_to_mfn_frame_list_list",
        = shared_info::offset::FRAME_LIST_LIST
    );
    offset!("shared_info_x86_64_t.arch.p2m_cr3", = shared_info::offset::P2M_CR3);
    offset!("shared_info_x86_64_t.arch.p2m_vaddr", = shared_info::offset::P2M_VADDR);
    offset!("shared_info_x86_64_t.arch.p2m_generation", = shared_info::offset::P2M_GENERATION);

    size!("start_info_t", raw::start_info);
    offset!("start_info_t.store_mfn", = start_info::offset::STORE);
    offset!("start_info_t.console.domU.mfn", = start_info::offset::CONSOLE);

    size!("struct xen_domctl", raw::xen_domctl);
    offset!("struct xen_domctl.domain", raw::xen_domctl, domain);
    offset!("struct xen_domctl.u", raw::xen_domctl, u);
    type Info = raw::xen_domctl_getdomaininfo;
    size!("struct xen_domctl_getdomaininfo", Info);
    offset!("struct xen_domctl_getdomaininfo.tot_pages", Info, tot_pages);
    offset!(
        "struct xen_domctl_getdomaininfo.shared_info_frame",
        Info,
        shared_info_frame
    );
    offset!(
        "struct xen_domctl_getdomaininfo.max_vcpu_id",
        Info,
        max_vcpu_id
    );
    offset!("struct xen_domctl_getdomaininfo.handle", Info, handle);
    type Shadow = raw::xen_domctl_shadow_op;
    size!("struct xen_domctl_shadow_op", Shadow);
    offset!(
        "struct xen_domctl_shadow_op.dirty_bitmap",
        Shadow,
        dirty_bitmap
    );
    offset!("struct xen_domctl_shadow_op.pages", Shadow, pages);
    offset!("struct xen_domctl_shadow_op.stats", Shadow, stats);
    type Types = raw::xen_domctl_getpageframeinfo3;
    size!("struct xen_domctl_getpageframeinfo3", Types);
    offset!("struct xen_domctl_getpageframeinfo3.array", Types, array);
    type Extended = raw::xen_domctl_ext_vcpucontext;
    size!("struct xen_domctl_ext_vcpucontext", Extended);
    offset!("struct xen_domctl_ext_vcpucontext.size", Extended, size);
    type Xsave = raw::xen_domctl_vcpuextstate;
    size!("struct xen_domctl_vcpuextstate", Xsave);
    offset!("struct xen_domctl_vcpuextstate.buffer", Xsave, buffer);
    size!("struct xen_domctl_vcpu_msrs", raw::xen_domctl_vcpu_msrs);
    size!("xen_domctl_vcpu_msr_t", raw::xen_domctl_vcpu_msr_t);
    offset!(
        "struct xen_domctl_vcpu_msrs.msrs",
        raw::xen_domctl_vcpu_msrs,
        msrs
    );
    size!("struct xen_domctl_getvcpuinfo", raw::xen_domctl_getvcpuinfo);
    size!("struct xen_sysctl_physinfo", raw::xen_sysctl_physinfo);
    size!("xen_cpuid_leaf_t", raw::xen_cpuid_leaf_t);
    size!("xen_msr_entry_t", raw::xen_msr_entry_t);

    offset!("DOMID_FIRST_RESERVED", = crate::domain_id::FIRST_RESERVED as usize);
    size!("xc_hypercall_buffer_t", raw::xc_hypercall_buffer_t);
    offset!(
        "xc_hypercall_buffer_t.hbuf",
        raw::xc_hypercall_buffer_t,
        hbuf
    );
    size!("xentoollog_logger", raw::xentoollog_logger);

    type Config = raw::libxl_domain_config;
    size!("libxl_domain_config", Config);
    offset!("libxl_domain_config.num_pcidevs", Config, num_pcidevs);
    offset!("libxl_domain_config.on_reboot", Config, on_reboot);
    size!(
        "libxl_domain_restore_params",
        raw::libxl_domain_restore_params
    );
    size!("libxl_event", raw::libxl_event);
    offset!("libxl_event.u", raw::libxl_event, u);
    size!("libxl_device_disk", raw::libxl_device_disk);
    size!("libxl_device_nic", raw::libxl_device_nic);
    size!("libxl_device_pci", raw::libxl_device_pci);
    size!("libxl_dominfo", raw::libxl_dominfo);
    size!("struct save_callbacks", raw::save_callbacks);
    size!("struct xc_domain_meminfo", raw::xc_domain_meminfo);

    // SAFETY: takes nothing, answers a constant.
    let entries = unsafe { xen_sys_layout_entries() };
    assert_eq!(seen.len(), entries, "entries that are not compared");
}

/// What the migration stream's specification says, whatever the headers.
#[test]
fn sizes_are_those_of_the_stream() {
    assert_eq!(size_of::<raw::vcpu_guest_context_x86_64>(), 5168);
    assert_eq!(size_of::<raw::xen_cpuid_leaf_t>(), 24);
    assert_eq!(size_of::<raw::xen_msr_entry_t>(), 16);
    assert_eq!(size_of::<raw::xen_domctl_vcpu_msr_t>(), 16);
    assert!(size_of::<raw::xen_domctl_ext_vcpucontext>() <= 128);
    assert!(size_of::<raw::vcpu_guest_context_any_t>() >= 5168);
}
