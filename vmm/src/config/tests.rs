use proptest::prelude::*;

use viommu::Gpa;
use viommu::doorbell::Doorbell;

use super::*;

fn parse(options: &[(&str, &str)]) -> Result<VmConfig, SchemaError> {
    let mut builder = Builder::default();
    for (option, text) in options {
        builder.option(option, text)?;
    }
    builder.build()
}

#[test]
fn option_strings_and_json_mean_the_same() {
    let options = parse(&[
        ("kernel", "/boot/vmlinuz"),
        ("initramfs", "/boot/initrd"),
        ("cmdline", "console=ttyS0 a=b,c"),
        ("cpus", "boot=4"),
        ("memory", "size=2G,hugepages=on,shared=off"),
        ("disk", "path=/a,readonly=on,id=root"),
        ("disk", "path=\"/b,c=d\""),
        ("net", "tap=tap0,mac=52:54:00:12:34:56"),
        ("serial", "file=/tmp/log"),
        ("console", "tty"),
        ("platform", "on_reboot=exit"),
    ])
    .unwrap();
    let json = Builder::from_json(
        "vm.json",
        r#"{
            "payload": {"kernel": "/boot/vmlinuz", "initramfs": "/boot/initrd",
                        "cmdline": "console=ttyS0 a=b,c"},
            "cpus": {"boot_vcpus": 4},
            "memory": {"size": "2G", "hugepages": true, "shared": false},
            "disks": [{"path": "/a", "readonly": true, "id": "root"}, {"path": "/b,c=d"}],
            "net": [{"tap": "tap0", "mac": "52:54:00:12:34:56"}],
            "serial": {"mode": "File", "file": "/tmp/log"},
            "console": {"mode": "Tty"},
            "platform": {"on_reboot": "Exit"}
        }"#,
    )
    .unwrap()
    .build()
    .unwrap();
    assert_eq!(options, json);
    assert_eq!(options.memory.size, Size(2 << 30));
    options.validate().unwrap();
}

#[test]
fn a_size_is_text_or_bytes() {
    let json = |size: &str| {
        let text = format!(r#"{{"payload":{{"kernel":"k"}},"memory":{{"size":{size}}}}}"#);
        Builder::from_json("f", &text)?.build()
    };
    assert_eq!(json("2147483648").unwrap(), json("\"2G\"").unwrap());
    assert!(json("-1").is_err());
    assert!(json("\"2g\"").is_err());
    assert!(json("\"99999999999T\"").is_err());
}

#[test]
fn what_is_wrong_is_said_in_one_sentence_with_the_value_and_the_remedy() {
    for (option, text, words) in [
        ("memory", "sise=1G", "did you mean \"size\""),
        ("memory", "size=1X", "size=1X is wrong"),
        ("memory", "size", "not key=value"),
        ("memory", "size=1G,size=2G", "twice"),
        ("memory", "size=1G,", "empty part"),
        ("memory", "zzzzzzzzz=1", "known are size, hugepages, shared"),
        ("memory", "hugepages=yes", "must be on or off"),
        ("cpus", "boot=-1", "must be a number"),
        ("cpus", "boot=300", "boot=300"),
        ("cpus", "boot=+1", "boot=+1"),
        ("disk", "readonly=on", "lacks path"),
        ("disk", "path=\"a", "not closed"),
        ("net", "tap=t,mac=zz", "52:54:00"),
        ("serial", "pty", "tty|null|file"),
        ("disc", "path=a", "did you mean \"disk\""),
    ] {
        let error = parse(&[("kernel", "k"), (option, text)])
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{option} {text}: {error}");
        assert!(!error.contains('\n'));
    }
    assert!(parse(&[]).unwrap_err().to_string().contains("--kernel"));
}

#[test]
fn an_unknown_json_key_is_refused_with_the_nearest_known_one() {
    let error = |text: &str| Builder::from_json("vm.json", text).unwrap_err().to_string();
    assert!(error(r#"{"diks": []}"#).contains("did you mean \"disks\""));
    let nested = error(r#"{"disks": [{"path": "a", "read_only": true}]}"#);
    assert!(nested.contains("disks[0] has no key \"read_only\"; did you mean \"readonly\""));
    assert!(error(r#"{"disks": {}}"#).contains("array"));
    assert!(error(r#"{"cpus": {"boot_vcpus": "4"}}"#).contains("cpus.boot_vcpus is \"4\""));
    assert!(error("[]").contains("no JSON object"));
    assert!(error("{").contains("not JSON"));
}

#[test]
fn a_configuration_that_makes_no_sense_is_refused() {
    for (options, words) in [
        (vec![("cpus", "boot=0")], "1 to 64"),
        (vec![("cpus", "boot=65")], "1 to 64"),
        (vec![("memory", "size=1M")], "at least 16M"),
        (vec![("memory", "size=33M")], "give 32M or 34M"),
        (vec![("console", "tty")], "both want the terminal"),
        (vec![("serial", "mode=file")], "file=PATH"),
        (vec![("net", "tap=t,mac=01:00:00:00:00:00")], "multicast"),
        (vec![("net", "tap=0123456789abcdef")], "1 to 15"),
        (
            vec![("disk", "path=a,id=x"), ("disk", "path=b,id=x")],
            "given twice",
        ),
        (vec![("disk", "path=a,id=a b")], "not an identifier"),
        (vec![("cmdline", "a\0b")], "NUL"),
        (vec![("disk", "path=a"); 33], "32 device numbers"),
        (vec![("landlock-rules", "path=/"); 257], "at most 256"),
        (
            vec![("disk", "path=a,viommu=x")],
            "viommu=x names no vIOMMU",
        ),
        (
            vec![("device", "path=/a"), ("device", "path=/a/")],
            "given twice",
        ),
        (vec![("device", "path=/")], "names no device"),
        (
            vec![("device", "path=/a,pasid_offset=258")],
            "multiple of 4",
        ),
        (vec![("device", "path=/a,dma-width=11")], "12 to 64"),
        (vec![("device", "path=/a,viommu=x")], "names no vIOMMU"),
        (
            vec![("device", "path=/a,id=x"), ("disk", "path=b,id=x")],
            "given twice",
        ),
        (vec![("test-device", "ats=off")], "pri=on needs ATS"),
        (vec![("test-device", "pasid_bits=21")], "give 0 to 20"),
        (vec![("viommu", "type=virtio,nested=on")], "has no nested"),
        (vec![("viommu", "id=x"), ("viommu", "id=x")], "given twice"),
        (vec![("viommu", "id=x"); 17], "at most 15"),
    ] {
        let mut all = vec![("kernel", "k")];
        all.extend(options);
        let error = parse(&all).unwrap().validate().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_device_behind_the_default_viommu_gets_one() {
    let valid = |options: &[(&str, &str)]| {
        let mut all = vec![("kernel", "k")];
        all.extend(options);
        parse(&all).unwrap().validate().unwrap()
    };
    assert!(valid(&[("disk", "path=a")]).viommus.is_empty());
    let one = valid(&[("disk", "path=a,iommu=on")]);
    assert_eq!(one.viommus, [ViommuConfig::default()]);
    let named = valid(&[
        ("disk", "path=a,iommu=on"),
        ("net", "tap=t,viommu=b"),
        ("viommu", "type=vtd,id=a,mode=legacy"),
        ("viommu", "id=b,mode=legacy,address-width=39"),
    ]);
    assert_eq!(named.viommus.len(), 2);
    assert_eq!(named.viommus[1].address_width, Some(39));
}

#[test]
fn a_doorbell_is_mapped_where_it_can_be_and_is_the_same_for_all() {
    let unit = |text: &str| {
        let mut builder = Builder::default();
        builder.option("kernel", "k").unwrap();
        for one in text.split(';') {
            builder.option("viommu", one).unwrap();
        }
        builder.build().unwrap().validate()
    };
    let at = |text: &str| unit(text).unwrap().doorbell();
    assert_eq!(at("type=virtio"), None);
    let in_place = Some(Doorbell::Mapped(Gpa(0xfee0_0000)));
    assert_eq!(at("type=virtio,msi=mapped"), in_place);
    let moved = Some(Doorbell::Mapped(Gpa(0x800_0000)));
    assert_eq!(at("type=virtio,msi=mapped,doorbell=0x8000000"), moved);
    for (text, word) in [
        ("msi=mapped", "type=virtio"),
        ("type=virtio,doorbell=0x8000000", "msi=mapped"),
        ("type=virtio,msi=mapped,doorbell=0x8000001", "0x100000"),
        ("type=virtio,msi=mapped,doorbell=0x100000", "0x1000000"),
        ("type=virtio,msi=mapped,doorbell=0xfec00000", "chipset"),
        (
            "type=virtio,id=a,msi=mapped;type=virtio,id=b,msi=mapped,doorbell=0x8000000",
            "id=a",
        ),
    ] {
        let error = unit(text).unwrap_err().to_string();
        assert!(error.contains(word), "{text}: {error}");
    }
}

#[test]
fn help_names_every_field_and_its_default() {
    for section in SECTIONS {
        let help = section.group.help();
        for field in section.group.fields {
            assert!(help.contains(field.syntax), "{help}");
            assert!(!field.docs.is_empty());
        }
    }
    let memory = MemoryConfig::GROUP.help();
    assert!(
        memory.contains("size=SIZE (default 512M): How much"),
        "{memory}"
    );
    assert!(
        CpusConfig::GROUP
            .help()
            .contains("In JSON: \"boot_vcpus\".")
    );
    assert_eq!(SerialConfig::GROUP.syntax(), "tty|null|file[,file=PATH]");
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused(pick: u8, text in ".{0,80}") {
        let mut input = vec![pick];
        input.extend_from_slice(text.as_bytes());
        fuzz::options(&input);
    }

    #[test]
    fn texts_that_look_like_options_are_parsed_or_refused(
        pick: u8,
        text in "((path|size|boot|id|tap|mac|mode|file|src)?=?(on|off|tty|1G|\"|,|[0-9a-z:]{0,4})){0,6}",
    ) {
        let mut input = vec![pick];
        input.extend_from_slice(text.as_bytes());
        fuzz::options(&input);
    }
}

#[test]
fn an_error_is_one_line_whatever_was_written() {
    let mut builder = Builder::default();
    let error = builder
        .option("console", "\n\u{1b}[2J")
        .unwrap_err()
        .to_string();
    assert!(error.contains("\\n\\u{1b}[2J"), "{error}");
    assert!(!error.chars().any(char::is_control), "{error}");
}
