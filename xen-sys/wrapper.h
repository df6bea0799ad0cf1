/* What bindgen reads. __XEN_TOOLS__ unlocks domctl.h and sysctl.h. */
#define __XEN_TOOLS__ 1

/* The newest libxl interface that 4.17 knows by number; later headers still offer it. */
#define LIBXL_API_VERSION 0x041400

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <xen/xen.h>
#include <xen/domctl.h>
#include <xen/sysctl.h>
#include <xen/memory.h>
#include <xen/version.h>
#include <xen/hvm/params.h>

#include <xentoollog.h>
#include <xenctrl.h>
#include <xenguest.h>
#include <xenforeignmemory.h>
#include <xenstore.h>

#include <libxl.h>
#include <libxl_event.h>
#include <libxl_utils.h>
